/* From a hidden state to the reads of the groups that a layer is going to attend to, in one call: predicted query, scores
 * of packed codes in one or two levels, the best groups, and which of them are in memory. The parts are those of query.c,
 * kernels.c and slots.c, in the order in which selection/transform_sketch.py and core/decode.py call them.
 */
#include "products.h"
#include "step.h"

#define GRAIN 32768 /* logits from which scoring is shared out: about ten microseconds */

/* Of kernels.c and query.c. */
int64_t kvswap_scratch_floats(int64_t rows, int64_t bits, int64_t heads, int64_t tiles, int64_t group_tokens,
                              int64_t batch, int64_t workers);
int64_t kvswap_group_mass(const uint8_t *codes, int64_t sequence_bytes, int64_t tile_bytes, int64_t rows, int64_t bits,
                          const float *query, const float *scales, int64_t batch, int64_t heads, const int64_t *tokens,
                          int64_t group_tokens, const int64_t *which, int64_t kind, int64_t workers, float *scratch,
                          float *mass, int64_t groups);
void kvswap_tile_mass(const uint8_t *codes, int64_t tile_bytes, int64_t rows, int64_t bits, const float *query,
                      const float *scales, int64_t heads, int64_t tokens, int64_t workers, float *scratch, float *mass);
void kvswap_project(const float *query, const uint16_t *matrix, int64_t batch, int64_t kv_heads, int64_t each,
                    int64_t elements, int64_t rank, float scaling, float *out);
void kvswap_top_groups(const float *scores, int64_t rows, int64_t groups, int64_t first, const int64_t *ends, int64_t count,
                       float *scratch, int64_t *picked);
int64_t kvswap_find(const int32_t *table, int64_t table_rows, int64_t columns, int64_t first_row, const int64_t *groups,
                    int64_t batch, int64_t count, const int64_t *ends, int64_t first, int64_t visit, const float *powers,
                    int64_t longest, float *worth, int32_t *seen, int64_t gap, int64_t places, int64_t staging_slot,
                    int64_t staging_address, int64_t slot_bytes, int64_t *out);

INLINE int64_t most(const int64_t *numbers, int64_t count) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) found = numbers[i] > found ? numbers[i] : found;
    return found;
}

INLINE int64_t workers_for(const Step *step, int64_t work) { return work >= GRAIN ? step->workers : 1; }

/* Floats of scratch, in this order. */
typedef struct {
    float *query, *low_rank, *mass, *places, *columns, *scales, *coarse, *scoring;
    int64_t *tiles;
} Memory;

static int64_t divide(const Layer *layer, const Step *step, const Sketch *sketch, int64_t group_tokens, float *base,
                      Memory *memory) {
    const int64_t rank = sketch->rows * (8 / sketch->bits), tokens = most(sketch->tokens, step->batch);
    const int64_t tiles = (tokens + TILE - 1) / TILE, groups = tokens / group_tokens, heads = layer->heads;
    const int64_t sizes[] = {step->batch * heads * layer->head_dim, step->batch * heads * rank, step->batch * groups,
                             groups + tiles + 1, heads * rank, rank, tiles + TILE * (sketch->fine + 1), 0};
    float **places[] = {&memory->query, &memory->low_rank, &memory->mass, &memory->places,
                        &memory->columns, &memory->scales, &memory->coarse, &memory->scoring};
    int64_t floats = 2 * (sketch->fine + 2);
    memory->tiles = (int64_t *)base;
    for (int n = 0; n < 8; n++) {
        *places[n] = base + floats;
        floats += (sizes[n] + 15) / 16 * 16;
    }
    floats += kvswap_scratch_floats(sketch->rows, sketch->bits, heads, tiles, group_tokens, step->batch, step->workers);
    return floats + kvswap_scratch_floats(sketch->few, sketch->bits, heads, tiles, TILE, 1, step->workers);
}

static int64_t makes_sense(const Layer *layer, const Step *step, const Sketch *sketch, int64_t group_tokens) {
    if ((sketch->bits != 2 && sketch->bits != 4) || sketch->rows < 1 || sketch->fine < 1) return 0;
    if (sketch->few < 0 || sketch->few > sketch->rows || sketch->few * (8 / sketch->bits) > RUN) return 0;
    if (group_tokens < 1 || TILE % group_tokens || layer->kv_heads < 1) return 0;
    for (int64_t b = 0; b < step->batch; b++)
        if (sketch->tokens[b] < 0 || sketch->tokens[b] > sketch->tiles * TILE) return 0;
    return 1;
}

/* Floats of scratch that kvswap_step_fetch needs with a sketch, by 8 bytes; 0 where the arguments have no sense. */
EXPORT int64_t kvswap_choose_floats(const Layer *layer, const Step *step, const Sketch *sketch, int64_t group_tokens) {
    static float nowhere;
    Memory memory;
    return makes_sense(layer, step, sketch, group_tokens) ? divide(layer, step, sketch, group_tokens, &nowhere, &memory) : 0;
}

/* The first `few` rows of every part of `rank` numbers. */
INLINE float *first_rows(const float *from, const Sketch *sketch, float *to) {
    for (int64_t part = 0; part < 8 / sketch->bits; part++)
        for (int64_t r = 0; r < sketch->few; r++) *to++ = from[part * sketch->rows + r];
    return to;
}

/* Mass of the groups of sequence b, a long one: 0 outside of the tiles that look best by a few rows. */
static int64_t two_levels(const Layer *layer, const Step *step, const Sketch *sketch, int64_t b, int64_t group_tokens,
                          const Memory *memory, float *mass) {
    const int64_t tokens = sketch->tokens[b], whole = tokens / TILE, rest = tokens % TILE, per_tile = TILE / group_tokens;
    const int64_t rank = sketch->rows * (8 / sketch->bits), groups = tokens / group_tokens, heads = layer->heads;
    const uint8_t *codes = sketch->codes + b * sketch->sequence_bytes;
    const float *query = memory->low_rank + b * heads * rank;
    float *to = memory->columns, *fine = memory->coarse + whole + 1;
    for (int64_t h = 0; h < heads; h++) to = first_rows(query + h * rank, sketch, to);
    first_rows(sketch->scales, sketch, memory->scales);
    kvswap_tile_mass(codes, sketch->tile_bytes, sketch->few, sketch->bits, memory->columns, memory->scales, heads,
                     whole * TILE, workers_for(step, whole * TILE * heads), memory->scoring, memory->coarse);
    for (int64_t n = 0; n < whole; n++)
        if (memory->coarse[n] != memory->coarse[n]) { /* nothing is the best among what compares with nothing */
            for (int64_t g = 0; g < groups; g++) mass[g] = memory->coarse[n];
            return 1;
        }
    kvswap_top_groups(memory->coarse, 1, whole, 0, &whole, sketch->fine, memory->places, memory->tiles);
    int64_t count = sketch->fine < whole ? sketch->fine : whole;
    if (rest) memory->tiles[count++] = whole; /* an incomplete last tile is always in */
    const int64_t some = rest ? (count - 1) * TILE + rest : count * TILE;
    const int64_t done = kvswap_group_mass(codes, 0, sketch->tile_bytes, sketch->rows, sketch->bits, query, sketch->scales,
                                           1, heads, &some, group_tokens, memory->tiles, 0,
                                           workers_for(step, some * heads), memory->scoring, fine, some / group_tokens);
    for (int64_t g = 0; g < groups; g++) mass[g] = 0.0f;
    for (int64_t n = 0; n < count; n++) {
        const int64_t first = memory->tiles[n] * per_tile, there = groups - first < per_tile ? groups - first : per_tile;
        memcpy(mass + first, fine + n * per_tile, (size_t)there * sizeof *mass);
    }
    return done;
}

INLINE float sum_of(const float *values, int64_t count) {
    float sums[16] = {0}, sum = 0.0f;
    int64_t n = 0;
    for (; n + 16 <= count; n += 16)
        for (int i = 0; i < 16; i++) sums[i] += values[n + i];
    for (; n < count; n++) sum += values[n];
    for (int i = 0; i < 16; i++) sum += sums[i];
    return sum;
}

/* Count what is attended to of one sequence: `picked` of its groups [first, end), all before them and all after them. */
INLINE void count_picked(Tally *tally, int64_t b, const float *mass, int64_t groups, int64_t first, int64_t end,
                         const int64_t *picked, int64_t count) {
    const float all = sum_of(mass, groups), one = 1.0f / all;
    float chosen = 0.0f;
    float *shares = tally->groups + b * tally->columns, *squares = tally->squares + b * tally->columns;
    if (!(all > 0.0f)) return;
    for (int64_t n = 0; n < count && picked[n] < end; n++) chosen += mass[picked[n]];
    const float part = chosen > 0.0f ? 1.0f / chosen : 0.0f;
    for (int64_t n = 0; n < count && picked[n] < end; n++) {
        const float own = mass[picked[n]];
        shares[picked[n]] += own * one;
        squares[picked[n]] += own * part * own * part;
    }
    tally->kept += (chosen + sum_of(mass, first) + sum_of(mass + end, groups - end)) * one;
    tally->choices++;
}

/* The `count` best groups of [first, ends[b]) for each sequence, [batch, count], ascending, filled up with the number of
 * all groups, by the query that `layer` is predicted to have.
 *
 * hidden  [batch, E], input of this layer or the one before
 * ends    [batch]: groups that are coded, at most; a sequence where it is at most `first` has nothing to choose from
 * scratch kvswap_choose_floats
 *
 * Returns 1; 0 where a score is not a number, so that nothing can be chosen; -1 where arguments have no sense. */
static int64_t choose(const Layer *layer, const Step *step, const void *hidden, const Sketch *sketch, int64_t group_tokens,
                      int64_t first, const int64_t *ends, int64_t count, float *scratch, int64_t floats, int64_t *picked) {
    const int64_t needed = kvswap_choose_floats(layer, step, sketch, group_tokens), batch = step->batch;
    Memory memory;
    if (needed == 0 || needed > floats || first < 0 || count < 1) return -1;
    for (int64_t b = 0; b < batch; b++)
        if (ends[b] < 0 || (ends[b] > first && ends[b] > sketch->tokens[b] / group_tokens)) return -1;
    if (step->tally && step->tally->columns < most(sketch->tokens, batch) / group_tokens) return -1;
    divide(layer, step, sketch, group_tokens, scratch, &memory);
    if (!kvswap_step_query(layer, step, hidden, memory.query)) return -1;
    const int64_t rank = sketch->rows * (8 / sketch->bits), tokens = most(sketch->tokens, batch);
    const int64_t groups = tokens / group_tokens, last = most(ends, batch);
    kvswap_project(memory.query, sketch->projection, batch, layer->kv_heads, layer->heads / layer->kv_heads,
                   layer->head_dim, rank, layer->scaling, memory.low_rank);
    int64_t done = 1;
    if (tokens <= sketch->flat)
        done = kvswap_group_mass(sketch->codes, sketch->sequence_bytes, sketch->tile_bytes, sketch->rows, sketch->bits,
                                 memory.low_rank, sketch->scales, batch, layer->heads, sketch->tokens, group_tokens, NULL, 0,
                                 workers_for(step, batch * tokens * layer->heads), memory.scoring, memory.mass, groups);
    else
        for (int64_t b = 0; b < batch; b++) {
            float *mass = memory.mass + b * groups;
            const int64_t own = sketch->tokens[b] / group_tokens;
            memset(mass + own, 0, (size_t)(groups - own) * sizeof *mass);
            if (sketch->tokens[b] > sketch->flat)
                done &= two_levels(layer, step, sketch, b, group_tokens, &memory, mass);
            else
                done &= kvswap_group_mass(sketch->codes + b * sketch->sequence_bytes, 0, sketch->tile_bytes, sketch->rows,
                                          sketch->bits, memory.low_rank + b * layer->heads * rank, sketch->scales, 1,
                                          layer->heads, sketch->tokens + b, group_tokens, NULL, 0,
                                          workers_for(step, sketch->tokens[b] * layer->heads), memory.scoring, mass, own);
        }
    if (!done) return -1;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t g = first; g < last; g++)
            if (memory.mass[b * groups + g] != memory.mass[b * groups + g]) return 0;
    kvswap_top_groups(memory.mass, batch, groups, first, ends, count, memory.places, picked);
    for (int64_t b = 0; step->tally && b < batch; b++)
        if (ends[b] > first)
            count_picked(step->tally, b, memory.mass + b * groups, sketch->tokens[b] / group_tokens, first, ends[b],
                         picked + b * count, count);
    return 1;
}

/* The reads that `layer`, whose number among the layers on disk is `order`, needs for its next token: choose, or without
 * a sketch all of `count` groups from `first` on, and then kvswap_find.
 *
 * hidden ... floats  as for choose
 * staging_*          as for kvswap_find
 * out                11 * batch * count + 3: the groups [batch, count], then what kvswap_find gives
 *
 * Returns how many reads there are; -1 where arguments have no sense; -2 where a score is not a number. */
EXPORT int64_t kvswap_step_fetch(const Layer *layer, const Step *step, const void *hidden, const Sketch *sketch,
                                 int64_t group_tokens, int64_t first, const int64_t *ends, int64_t count, float *scratch,
                                 int64_t floats, const Pool *pool, int64_t order, int64_t staging_slot,
                                 int64_t staging_address, int64_t *out) {
    const int64_t size = step->batch * count, rows = order * step->batch;
    if (first < 0 || count < 1 || order < 0 || rows + step->batch > pool->rows) return -1;
    if (sketch) {
        const int64_t chosen = choose(layer, step, hidden, sketch, group_tokens, first, ends, count, scratch, floats, out);
        if (chosen < 1) return chosen < 0 ? -1 : -2;
    } else {
        for (int64_t n = 0; n < size; n++) out[n] = first + n % count;
    }
    const int64_t visit = pool->visits[order] + 1;
    const int64_t reads = kvswap_find(pool->table, pool->rows, pool->columns, rows, out, step->batch, count, ends,
                                      pool->first, visit, pool->powers, pool->longest, pool->worth, pool->seen, pool->gap,
                                      pool->places, staging_slot, staging_address, pool->slot_bytes, out + size);
    if (reads >= 0) pool->visits[order] = (int32_t)visit;
    return reads;
}
