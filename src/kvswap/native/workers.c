#include "workers.h"

#if defined(__GNUC__)
#define NEXT(number) __atomic_fetch_add(&(number), 1, __ATOMIC_RELAXED)
#else
#include <intrin.h>
#define NEXT(number) _InterlockedExchangeAdd64(&(number), 1)
#endif

typedef void Parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);
typedef int Number(void);

static Parallel *parallel;       /* GOMP_parallel */
static Number *thread, *threads; /* omp_get_thread_num, omp_get_num_threads */

typedef struct {
    Work *work;
    const void *task;
    int64_t items, next;
} Job;

/* Each worker takes the next item when it is done with one: cores are not equally fast, nor free all the time. */
static void do_share(void *data) {
    Job *job = data;
    const int64_t worker = thread();
    for (;;) {
        const int64_t item = NEXT(job->next);
        if (item >= job->items) return;
        job->work(job->task, item, worker);
    }
}

void kvswap_do_all(Work *work, const void *task, int64_t items, int64_t workers) {
    Job job = {work, task, items, 0};
    if (parallel && workers > 1 && items > 1) {
        parallel(do_share, &job, (unsigned)(workers < items ? workers : items), 0);
        return;
    }
    for (int64_t item = 0; item < items; item++) work(task, item, 0);
}

/* The entry points of an OpenMP runtime. */
EXPORT void kvswap_use_threads(Parallel *with, Number *number, Number *count) {
    thread = number;
    threads = count;
    parallel = with;
}
