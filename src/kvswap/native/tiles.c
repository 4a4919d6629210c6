/* Attention of a few queries to all tokens of a tile, from groups as they are stored: no K, V are written as floats.
 *
 * The weights are those of a softmax; tiles are merged by log-sum-exp, as in core/attention.py, with which the tests
 * compare this.
 */
#include <math.h>

#include "convert.h"
#include "workers.h"

#define BLOCK 64 /* tokens that are converted at a time */
#define WIDE 8   /* floats that are summed side by side */

/* Compilers make the best of it that a processor has; arrays of this length they may leave in memory. */
typedef float Wide __attribute__((vector_size(WIDE * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(WIDE * sizeof(float)), aligned(4), may_alias));

#define LOAD(from) (*(const Unaligned *)(from))

/* What is shared out to workers; the letters are those of kvswap_attend_groups. */
typedef struct {
    const uint16_t *slots;
    int64_t slot_elements;
    const int64_t *index;
    int64_t count, heads, group_tokens, head_dim;
    Convert *convert;
    const float *query;
    int64_t rows, parts;
    float *scratch;
    int64_t item_floats;
} Attending;

INLINE float product(const float *a, const float *b, int64_t count) {
    Wide sums = {0}, others = {0};
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + 2 * WIDE <= count; i += 2 * WIDE) {
        sums += LOAD(a + i) * LOAD(b + i);
        others += LOAD(a + i + WIDE) * LOAD(b + i + WIDE);
    }
    for (; i < count; i++) rest += a[i] * b[i];
    sums += others;
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7])) + rest;
}

/* sum = sum * keep + weights . values: `tokens` rows of values. */
INLINE void add_weighted(const float *weights, const float *values, int64_t tokens, int64_t head_dim, float keep,
                         float *sum) {
    int64_t first = 0;
    for (; first + 4 * WIDE <= head_dim; first += 4 * WIDE) {
        Wide sums[4];
        for (int j = 0; j < 4; j++) sums[j] = LOAD(sum + first + j * WIDE) * keep;
        for (int64_t t = 0; t < tokens; t++) {
            const float *row = values + t * head_dim + first;
            sums[0] += weights[t] * LOAD(row);
            sums[1] += weights[t] * LOAD(row + WIDE);
            sums[2] += weights[t] * LOAD(row + 2 * WIDE);
            sums[3] += weights[t] * LOAD(row + 3 * WIDE);
        }
        memcpy(sum + first, sums, sizeof sums);
    }
    for (; first < head_dim; first++) {
        float one = sum[first] * keep;
        for (int64_t t = 0; t < tokens; t++) one += weights[t] * values[t * head_dim + first];
        sum[first] = one;
    }
}

/* One part of the groups for one KV head, into its own peaks, totals and sums. */
CLONES static void attend_part(const void *task, int64_t item, int64_t worker) {
    const Attending *all = task;
    const int64_t h = item / all->parts, part = item % all->parts, run = all->group_tokens * all->head_dim;
    const int64_t rows = all->rows, dim = all->head_dim, stop = all->count * (part + 1) / all->parts;
    float *peaks = all->scratch + item * all->item_floats, *totals = peaks + rows, *sums = totals + rows;
    float *keys = sums + rows * dim, *values = keys + BLOCK * dim, logits[BLOCK];
    const int64_t together = BLOCK / all->group_tokens;
    (void)worker;
    for (int64_t r = 0; r < rows; r++) peaks[r] = -INFINITY;
    memset(totals, 0, (size_t)(rows + rows * dim) * sizeof *totals);
    for (int64_t n = all->count * part / all->parts; n < stop; n += together) {
        const int64_t groups = n + together < stop ? together : stop - n, tokens = groups * all->group_tokens;
        for (int64_t g = 0; g < groups; g++) {
            const uint16_t *slot = all->slots + all->index[n + g] * all->slot_elements;
            all->convert(slot + h * run, run, keys + g * run);
            all->convert(slot + (all->heads + h) * run, run, values + g * run);
        }
        for (int64_t r = 0; r < rows; r++) {
            const float *query = all->query + (h * rows + r) * dim;
            float peak = peaks[r], total = 0.0f;
            for (int64_t t = 0; t < tokens; t++) {
                logits[t] = product(query, keys + t * dim, dim);
                peak = logits[t] > peak ? logits[t] : peak;
            }
            const float keep = peaks[r] == peak ? 1.0f : exponential(peaks[r] - peak);
            for (int64_t t = 0; t < tokens; t++) logits[t] = exponential(logits[t] - peak);
            for (int64_t t = 0; t < tokens; t++) total += logits[t];
            totals[r] = totals[r] * keep + total;
            peaks[r] = peak;
            add_weighted(logits, values, tokens, dim, keep, sums + r * dim);
        }
    }
}

INLINE int64_t attending_floats(int64_t rows, int64_t head_dim) { return rows * (2 + head_dim) + 2 * BLOCK * head_dim; }

/* Floats of scratch that kvswap_attend_groups needs with so many workers. */
EXPORT int64_t kvswap_attending_floats(int64_t heads, int64_t rows, int64_t head_dim, int64_t workers) {
    return heads * workers * attending_floats(rows, head_dim);
}

/* Add the tokens of whole groups to an attention that is on its way.
 *
 * slots     `known` rows of `slot_elements` 16-bit elements, each a group [2, heads, group_tokens, head_dim] and padding
 * index     [count] rows to take
 * query     [heads, rows, head_dim], scaled
 * peak, total, sum  [heads, rows], the same, and [heads, rows, head_dim]: the largest logit so far, and the sums of
 *           exponentials against it, alone and times values; -inf, 0, 0 before the first tokens
 * scratch   kvswap_attending_floats
 *
 * Returns whether all rows exist and a group has at most BLOCK tokens; otherwise nothing was done.
 */
EXPORT int64_t kvswap_attend_groups(const uint16_t *slots, int64_t known, int64_t slot_elements, const int64_t *index,
                                    int64_t count, int64_t heads, int64_t group_tokens, int64_t head_dim,
                                    int64_t bfloat16, const float *query, int64_t rows, int64_t workers, float *scratch,
                                    float *peak, float *total, float *sum) {
    if (group_tokens < 1 || group_tokens > BLOCK || 2 * heads * group_tokens * head_dim > slot_elements) return 0;
    for (int64_t n = 0; n < count; n++)
        if (index[n] < 0 || index[n] >= known) return 0;
    const int64_t floats = attending_floats(rows, head_dim);
    const Attending all = {slots, slot_elements, index, count, heads, group_tokens, head_dim,
                           bfloat16 ? kvswap_convert_bfloat16() : kvswap_convert_float16(),
                           query, rows, workers, scratch, floats};
    kvswap_do_all(attend_part, &all, heads * workers, workers);
    for (int64_t item = 0; item < heads * workers; item++) {
        const float *peaks = scratch + item * floats, *totals = peaks + rows, *sums = totals + rows;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = item / workers * rows + r;
            if (totals[r] == 0.0f) continue; /* a part without groups */
            const float top = peaks[r] > peak[at] ? peaks[r] : peak[at];
            const float keep = peak[at] == top ? 1.0f : exponential(peak[at] - top);
            const float fresh = peaks[r] == top ? 1.0f : exponential(peaks[r] - top);
            total[at] = total[at] * keep + totals[r] * fresh;
            for (int64_t i = 0; i < head_dim; i++)
                sum[at * head_dim + i] = sum[at * head_dim + i] * keep + sums[r * head_dim + i] * fresh;
            peak[at] = top;
        }
    }
    return 1;
}
