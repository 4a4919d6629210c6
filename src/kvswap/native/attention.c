/* Attention of a decode step, straight from the slots that K and V lie in.
 *
 * The groups of each sequence are shared out to workers. A worker converts SPAN tokens of one KV head at a time, which
 * stay in the nearest cache, and attends with all query heads of that KV head. What workers found is merged by the online
 * softmax of Milakov and Gimelshein (arXiv 1805.02867).
 */
#include "convert.h"
#include "step.h"
#include "workers.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif

#define SPAN 64  /* tokens, at least one group */
#define LANES 16 /* partial sums, so that a compiler makes vectors of them */

typedef float Eight __attribute__((vector_size(32)));

static void from_floats(const void *from, int64_t count, float *to) { memcpy(to, from, (size_t)count * 4); }

static Convert *converter(int64_t type) {
    if (type == F32) return from_floats;
    return type == BF16 ? kvswap_convert_bfloat16() : kvswap_convert_float16();
}

/* Products of one query with eight keys [8, d]. */
INLINE void eight_products(const float *query, const float *keys, int64_t d, float *out) {
    Eight sums[8], own, key;
    int64_t i = 0;
    for (int t = 0; t < 8; t++) sums[t] = (Eight){0}; /* not memset: a compiler makes a slow loop of it */
    for (; i + 8 <= d; i += 8) {
        memcpy(&own, query + i, sizeof own);
        for (int t = 0; t < 8; t++) {
            memcpy(&key, keys + t * d + i, sizeof key);
            sums[t] += own * key;
        }
    }
#ifdef SHUFFLES
    Eight two[4], four[2];
    for (int t = 0; t < 4; t++)
        two[t] = __builtin_shufflevector(sums[2 * t], sums[2 * t + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
                 __builtin_shufflevector(sums[2 * t], sums[2 * t + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int t = 0; t < 2; t++)
        four[t] = __builtin_shufflevector(two[2 * t], two[2 * t + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                  __builtin_shufflevector(two[2 * t], two[2 * t + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    own = __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
          __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
    memcpy(out, &own, sizeof own);
#else
    for (int t = 0; t < 8; t++) {
        out[t] = 0.0f;
        for (int k = 0; k < 8; k++) out[t] += sums[t][k];
    }
#endif
    for (; i < d; i++)
        for (int t = 0; t < 8; t++) out[t] += query[i] * keys[t * d + i];
}

/* out [8 * count] (known when compiled) += weights [tokens] times columns of values [tokens, d]. */
INLINE void weigh(const float *weights, const float *values, int64_t tokens, int64_t d, const int count, float *out) {
    Eight sums[8], row;
    for (int i = 0; i < count; i++) memcpy(&sums[i], out + 8 * i, sizeof row);
    for (int64_t t = 0; t < tokens; t++)
        for (int i = 0; i < count; i++) {
            memcpy(&row, values + t * d + 8 * i, sizeof row);
            sums[i] += weights[t] * row;
        }
    for (int i = 0; i < count; i++) memcpy(out + 8 * i, &sums[i], sizeof row);
}

/* What one worker has found for one query head: the largest logit, the sum of exponentials against it, and the sum of
 * values weighted by them, [d]. */
typedef struct {
    float peak, total;
} Found;

/* Take `tokens` more, whose logits [SPAN] are there already and are lost; values [tokens, d]. */
INLINE void take(float *logits, const float *values, int64_t tokens, int64_t d, Found *found, float *sums) {
    float peak = found->peak, total = 0.0f, many[LANES];
    for (int64_t t = tokens; t < SPAN; t++) logits[t] = -INFINITY;
    memcpy(many, logits, sizeof many);
    for (int t = LANES; t < SPAN; t += LANES)
        for (int k = 0; k < LANES; k++) many[k] = logits[t + k] > many[k] ? logits[t + k] : many[k];
    for (int k = 0; k < LANES; k++) peak = many[k] > peak ? many[k] : peak;
    for (int t = 0; t < SPAN; t++) logits[t] = exponential(logits[t] - peak);
    for (int64_t t = tokens; t < SPAN; t++) logits[t] = 0.0f;
    memcpy(many, logits, sizeof many);
    for (int t = LANES; t < SPAN; t += LANES)
        for (int k = 0; k < LANES; k++) many[k] += logits[t + k];
    for (int k = 0; k < LANES; k++) total += many[k];
    if (peak > found->peak) {
        const float keep = exponential(found->peak - peak);
        for (int64_t i = 0; i < d; i++) sums[i] *= keep;
        found->total *= keep;
        found->peak = peak;
    }
    found->total += total;
    int64_t i = 0;
    for (; i + 64 <= d; i += 64) weigh(logits, values + i, tokens, d, 8, sums + i);
    for (; i + 8 <= d; i += 8) weigh(logits, values + i, tokens, d, 1, sums + i);
    for (; i < d; i++)
        for (int64_t t = 0; t < tokens; t++) sums[i] += logits[t] * values[t * d + i];
}

/* What is shared out to workers; the letters are those of kvswap_attend. */
typedef struct {
    const Layer *layer;
    const Slots *slots;
    const float *query;
    const int64_t *index;
    const uint8_t *valid;
    int64_t width;
    const int64_t *offset;
    int64_t parts; /* of each sequence's groups */
    Convert *convert;
    uint8_t *scratch;
    int64_t worker_bytes;
    Found *found; /* [batch, parts, heads] */
    float *sums;  /* [batch, parts, heads, d] */
} Attending;

/* A worker's scratch: SPAN tokens of one head's keys or values, rounded up to eight, and logits of its query heads. */
INLINE int64_t worker_bytes(const Layer *layer) {
    return whole_lines((SPAN * layer->head_dim + layer->heads / layer->kv_heads * SPAN) * 4);
}

/* The newest group of a sequence: the last one that is real. */
INLINE int64_t newest_of(const Attending *all, int64_t b) {
    int64_t n = all->width - 1;
    while (n > 0 && all->valid && !all->valid[b * all->width + n]) n--;
    return n;
}

/* One span of one KV head: groups [first, stop) of a sequence, to `found` and `sums` of its query heads. */
INLINE void attend_span(const Attending *all, int64_t b, int64_t h, int64_t first, int64_t stop, int64_t newest,
                        float *tile, Found *found, float *sums) {
    const Layer *layer = all->layer;
    const Slots *slots = all->slots;
    const int64_t d = layer->head_dim, each = layer->heads / layer->kv_heads, run = slots->group_tokens * d;
    const int64_t item = slots->type == F32 ? 4 : 2;
    const float *query = all->query + (b * layer->heads + h * each) * d;
    float *logits = tile + SPAN * d;
    int64_t tokens = 0;
    for (int64_t part = 0; part < 2; part++) {
        const int64_t place = (part * layer->kv_heads + h) * run * item;
        tokens = 0;
        for (int64_t n = first; n < stop; n++) {
            if (all->valid && !all->valid[b * all->width + n]) continue;
            const int64_t count = n < newest ? slots->group_tokens : all->offset[b] + 1;
            const uint8_t *from = slots->data + all->index[b * all->width + n] * slots->slot_bytes + place;
            all->convert(from, count * d, tile + tokens * d);
            tokens += count;
        }
        if (part == 0)
            for (int64_t q = 0; q < each; q++)
                for (int64_t t = 0; t < tokens; t += 8) eight_products(query + q * d, tile + t * d, d, logits + q * SPAN + t);
    }
    if (tokens == 0) return;
    for (int64_t q = 0; q < each; q++) {
        for (int64_t t = 0; t < SPAN; t++) logits[q * SPAN + t] *= layer->scaling;
        take(logits + q * SPAN, tile, tokens, d, found + h * each + q, sums + (h * each + q) * d);
    }
}

/* One part of one sequence's groups. */
CLONES static void attend_part(const void *task, int64_t item, int64_t worker) {
    const Attending *all = task;
    const int64_t heads = all->layer->heads, d = all->layer->head_dim, b = item / all->parts, part = item % all->parts;
    const int64_t stop = all->width * (part + 1) / all->parts, together = SPAN / all->slots->group_tokens;
    const int64_t newest = newest_of(all, b);
    float *tile = (float *)(all->scratch + worker * all->worker_bytes), *sums = all->sums + item * heads * d;
    Found *found = all->found + item * heads;
    for (int64_t h = 0; h < heads; h++) found[h] = (Found){-INFINITY, 0.0f};
    memset(sums, 0, (size_t)(heads * d) * sizeof *sums);
    memset(tile, 0, (size_t)all->worker_bytes);
    for (int64_t n = all->width * part / all->parts; n < stop; n += together)
        for (int64_t h = 0; h < all->layer->kv_heads; h++)
            attend_span(all, b, h, n, n + together < stop ? n + together : stop, newest, tile, found, sums);
}

INLINE int64_t parts_of(int64_t batch, int64_t workers) { return batch < workers ? (workers + batch - 1) / batch : 1; }

int64_t kvswap_attend_bytes(const Layer *layer, int64_t batch, int64_t workers) {
    const int64_t results = batch * parts_of(batch, workers) * layer->heads;
    return workers * worker_bytes(layer) + whole_lines(results * (int64_t)sizeof(Found)) +
           whole_lines(results * layer->head_dim * 4);
}

/* What the parts of one sequence found, as one. */
INLINE void merge_parts(const Attending *all, int64_t b, float *out) {
    const int64_t heads = all->layer->heads, d = all->layer->head_dim;
    for (int64_t h = 0; h < heads; h++, out += d) {
        float peak = -INFINITY, total = 0.0f;
        for (int64_t n = b * all->parts; n < (b + 1) * all->parts; n++)
            peak = all->found[n * heads + h].peak > peak ? all->found[n * heads + h].peak : peak;
        for (int64_t i = 0; i < d; i++) out[i] = 0.0f;
        for (int64_t n = b * all->parts; n < (b + 1) * all->parts; n++) {
            const Found *found = all->found + n * heads + h;
            const float keep = exponential(found->peak - peak), *sums = all->sums + (n * heads + h) * d;
            total += found->total * keep;
            for (int64_t i = 0; i < d; i++) out[i] += sums[i] * keep;
        }
        for (int64_t i = 0; i < d; i++) out[i] /= total;
    }
}

CLONES void kvswap_attend(const Layer *layer, const Slots *slots, const float *query, int64_t batch, const int64_t *index,
                          const uint8_t *valid, int64_t width, const int64_t *offset, int64_t workers, uint8_t *scratch,
                          float *out) {
    const int64_t parts = parts_of(batch, workers), size = worker_bytes(layer), results = batch * parts * layer->heads;
    uint8_t *found = scratch + workers * size;
    const Attending all = {layer, slots, query, index, valid, width, offset, parts, converter(slots->type), scratch, size,
                           (Found *)found, (float *)(found + whole_lines(results * (int64_t)sizeof(Found)))};
    kvswap_do_all(attend_part, &all, batch * parts, workers);
    for (int64_t b = 0; b < batch; b++) merge_parts(&all, b, out + b * layer->heads * layer->head_dim);
}

/* `count` slots behind those in `index` and `real`, counted from `first`; returns how many of them are not real. */
INLINE int64_t place_slots(const int64_t *slots, const uint8_t *slots_real, int64_t count, int64_t first, int64_t otherwise,
                           int64_t *index, uint8_t *real) {
    int64_t missing = 0;
    for (int64_t n = 0; n < count; n++) {
        real[n] = slots_real == NULL || slots_real[n];
        index[n] = real[n] ? first + slots[n] : otherwise;
        missing += !real[n];
    }
    return missing;
}

/* All slots that a layer attends to, in order of position: sinks, chosen groups, newest groups.
 *
 * first        [batch]: the first pinned slot
 * chosen       [batch, count]; those count that `chosen_real` names, NULL: all
 * index, real  [batch, sink_count + count + ring_count]; where an entry is not real, index is a slot that exists
 *
 * Returns whether all are real. */
EXPORT int64_t kvswap_attended(const Pinned *pinned, int64_t batch, const int64_t *first, const int64_t *chosen,
                               const uint8_t *chosen_real, int64_t count, int64_t *index, uint8_t *real) {
    const int64_t sinks = pinned->sink_count, ring = pinned->ring_count;
    int64_t missing = 0;
    for (int64_t b = 0; b < batch; b++) {
        const uint8_t *mine = chosen_real ? chosen_real + b * count : NULL;
        missing += place_slots(pinned->sinks + b * sinks, pinned->sinks_real + b * sinks, sinks, first[b], first[b], index, real);
        index += sinks;
        real += sinks;
        missing += place_slots(chosen + b * count, mine, count, 0, first[b], index, real);
        index += count;
        real += count;
        missing += place_slots(pinned->ring + b * ring, pinned->ring_real + b * ring, ring, first[b], first[b], index, real);
        index += ring;
        real += ring;
    }
    return missing == 0;
}
