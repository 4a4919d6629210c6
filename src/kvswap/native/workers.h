/* Independent items shared out to the threads that PyTorch computes with, which wait for work anyway.
 *
 * Threads of our own would share their cores with those: an OpenMP runtime lets its threads spin for a while after a
 * parallel region. So the runtime that PyTorch has loaded is asked, through the entry points that compilers use; until
 * kvswap_use_threads is called, and where there is no such runtime, the calling thread does it all.
 */
#ifndef KVSWAP_WORKERS_H
#define KVSWAP_WORKERS_H

#include "common.h"

/* One item of `task`; `worker` counts from 0, so that each can have memory of its own. */
typedef void Work(const void *task, int64_t item, int64_t worker);

/* All items, by at most `workers` threads. */
void kvswap_do_all(Work *work, const void *task, int64_t items, int64_t workers);

#endif
