/* All layers of a decode step, one after the other: what core/compiled_step.py does for each layer, without going back to
 * Python between them. Only reads and errors do that: a run stops in front of a layer whose groups are being read, or after
 * planning reads for the next one, and goes on from there when it is called again.
 */
#include <time.h>

#include "step.h"

/* Where layers with one length of window put and find tokens in a step: the newest one at `offset` of slot `newest`, both
 * [batch]; `index` [batch, width], `valid` and `last` are index, valid and offset of kvswap_attend. */
typedef struct {
    const int64_t *newest, *offset, *index;
    const uint8_t *valid;
    int64_t width;
    const int64_t *last;
} Window;

/* One layer of a run.
 *
 * sketch  to choose `count` groups by; NULL: all of `count` groups
 * pinned  [batch] its first pinned slots
 * order   its number among the layers on disk
 * groups  [batch, count] what it attends to beside sinks and newest groups is written here
 * window  of a layer that keeps a sliding window in memory, in `slots` of its own: then `count` is 0, and `sketch`, `pinned`,
 *         `order` and `groups` have no sense; else NULL
 * cosine, sine, rope_stride  as in Step, of this layer
 */
typedef struct {
    const Layer *layer;
    const Sketch *sketch;
    const Slots *slots;
    const int64_t *pinned;
    int64_t order, count;
    int64_t *groups;
    const Window *window;
    const float *cosine, *sine;
    int64_t rope_stride;
} RunLayer;

/* A run.
 *
 * first, ends           the groups to choose from, as for kvswap_step_fetch
 * tail, offset          [batch] the newest token's slot, counted from `pinned`, and its place there
 * staging_*             where the layers with even and with odd numbers read to
 * choosing              scratch of kvswap_run_floats
 * out                   two times what kvswap_step_fetch gives, for layers with even and odd numbers
 * index, newest, real   scratch: [batch, groups attended to], [batch], and bytes for two times `index`
 * hidden                [batch, E] input and output
 * at, begun, chosen     the layer to go on with, whether its query, K and V are computed, the last layer chosen for
 * reads                 how many reads layer `at` (by its number modulo two) and the next one have
 * selected              groups of layers that read nothing
 * predict_s, slots_s    what choosing and looking up took, and putting together what is attended to
 */
typedef struct {
    const RunLayer *layers;
    int64_t count;
    const Pool *pool;
    const Pinned *pinned;
    int64_t group_tokens, first;
    const int64_t *ends, *tail, *offset;
    int64_t staging_slot[2], staging_address[2];
    float *choosing;
    int64_t floats;
    int64_t *out[2];
    int64_t *index, *newest;
    uint8_t *real;
    void *hidden;
    int64_t at, begun, chosen;
    int64_t reads[2];
    int64_t selected;
    double predict_s, slots_s;
} Run;

enum { THROUGH = 1, READS = 0, WRONG = -1, NOT_FINITE = -2 };

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Floats of scratch, by 8 bytes, that choosing needs in the layers of a run. */
EXPORT int64_t kvswap_run_floats(const Run *run, const Step *step) {
    int64_t floats = 0;
    for (int64_t n = 0; n < run->count; n++) {
        const RunLayer *each = run->layers + n;
        const int64_t needed = each->sketch ? kvswap_choose_floats(each->layer, step, each->sketch, run->group_tokens) : 0;
        floats = needed > floats ? needed : floats;
    }
    return floats;
}

/* The step as layer n takes it. */
static Step step_of(const Run *run, const Step *step, int64_t n) {
    const RunLayer *layer = run->layers + n;
    Step own = *step;
    own.cosine = layer->cosine;
    own.sine = layer->sine;
    own.rope_stride = layer->rope_stride;
    return own;
}

/* Choose and look up the groups of layer n. */
static int64_t fetch(Run *run, const Step *step, int64_t n) {
    const RunLayer *to = run->layers + n;
    const Step own = step_of(run, step, n);
    const int64_t half = n % 2, size = step->batch * to->count;
    const double begun_s = now_s();
    run->chosen = n;
    run->reads[half] = 0;
    if (to->count == 0) return READS;
    const int64_t reads = kvswap_step_fetch(to->layer, &own, run->hidden, to->sketch, run->group_tokens, run->first,
                                            run->ends, to->count, run->choosing, run->floats, run->pool, to->order,
                                            run->staging_slot[half], run->staging_address[half], run->out[half]);
    run->predict_s += now_s() - begun_s;
    if (reads < 0) return reads;
    memcpy(to->groups, run->out[half], (size_t)size * sizeof *to->groups);
    run->reads[half] = reads;
    if (reads == 0) run->selected += run->out[half][11 * size]; /* the first total of kvswap_find */
    return READS;
}

/* Query, K and V of layer n. */
static int64_t begin(Run *run, const Step *step, int64_t n) {
    const RunLayer *here = run->layers + n;
    const Window *window = here->window;
    const Step own = step_of(run, step, n);
    if (!window)
        for (int64_t b = 0; b < step->batch; b++) run->newest[b] = here->pinned[b] + run->tail[b];
    return kvswap_step_begin(here->layer, &own, run->hidden, here->slots, window ? window->newest : run->newest,
                             window ? window->offset : run->offset) ? READS : WRONG;
}

/* The output of layer n, whose groups are in their slots. */
static int64_t finish(Run *run, const Step *step, int64_t n) {
    const RunLayer *here = run->layers + n;
    const Window *window = here->window;
    if (window)
        return kvswap_step_finish(here->layer, step, here->slots, window->index, window->valid, window->width, window->last,
                                  run->hidden) ? READS : WRONG;
    const int64_t size = step->batch * here->count, width = run->pinned->sink_count + here->count + run->pinned->ring_count;
    uint8_t *real = run->real, *chosen_real = run->real + step->batch * width;
    const double begun_s = now_s();
    for (int64_t i = 0; i < size; i++) chosen_real[i] = here->groups[i] < run->ends[i / here->count];
    const int64_t complete = kvswap_attended(run->pinned, step->batch, here->pinned, run->out[n % 2] + size, chosen_real,
                                             here->count, run->index, real);
    run->slots_s += now_s() - begun_s;
    return kvswap_step_finish(here->layer, step, here->slots, run->index, complete ? NULL : real, width, run->offset,
                              run->hidden) ? READS : WRONG;
}

/* Go on with a run. Returns THROUGH at its end. READS: layer `at` is begun, and before the next call the reads that are
 * planned for the layer after it are to be started, and those of layer `at` waited for. WRONG: arguments have no sense.
 * NOT_FINITE: a score of layer `chosen` is not a number. */
EXPORT int64_t kvswap_step_run(Run *run, const Step *step) {
    for (; run->at < run->count; run->at++, run->begun = 0) {
        int64_t done = READS;
        if (!run->begun) {
            if (run->at == 0) done = fetch(run, step, 0);
            if (done == READS && run->at + 1 < run->count) done = fetch(run, step, run->at + 1);
            if (done == READS) done = begin(run, step, run->at);
            if (done != READS) return done;
            run->begun = 1;
            if (run->reads[0] || run->reads[1]) return READS;
        }
        done = finish(run, step, run->at);
        if (done != READS) return done;
        run->reads[run->at % 2] = 0;
    }
    return THROUGH;
}
