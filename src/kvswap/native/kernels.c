/* Scoring of packed codes in one pass: unpack, multiply, exponentiate, sum by group; and the choice of the best groups.
 *
 * Plain C without Python or NumPy headers, called through ctypes. Everything here has an equivalent in torch; the
 * tests compare the two. Loops over TILE tokens have a constant length, so that a compiler turns them into vectors of
 * whatever width the processor has.
 */
#include <float.h>
#include <math.h>

#include "products.h"
#include "workers.h"

#define VERSION 18   /* of the functions' arguments; library.py must have the same */
#define PARTS 4      /* of the tiles to score, for each worker: cores are not equally fast, nor free all the time */
#define AHEAD 8      /* tiles */
#define BLOCK 64     /* scores that are passed over together where none is among the best */
#define NOTHING 20.f /* logits this far below one that was seen count as none: e^-20 of its weight */

/* exp(x) for x <= 0 to 3e-6 relative: 2^n by the exponent's bits, 2^f on [-1/2, 1/2] by the polynomial of degree 4 whose
 * largest error is least. */
INLINE float exp_below_zero(float x) {
    float t = (x < -60.0f ? -60.0f : x) * 1.44269504f;
    float n = (t + 12582912.0f) - 12582912.0f;
    float f = t - n;
    float p = 9.5701e-3f;
    p = p * f + 5.591786e-2f;
    p = p * f + 2.4024745e-1f;
    p = p * f + 6.9312181e-1f;
    p = p * f + 9.9999926e-1f;
    uint32_t bits; /* unsigned: shifting a negative number is undefined */
    memcpy(&bits, &p, 4);
    bits += (uint32_t)(int32_t)n << 23;
    memcpy(&p, &bits, 4);
    return p;
}

/* The largest of a tile's values. */
INLINE float largest(const float *logits) {
    float peaks[16];
    for (int t = 0; t < 16; t++) peaks[t] = logits[t];
    for (int n = 16; n < TILE; n += 16)
        for (int t = 0; t < 16; t++) peaks[t] = logits[n + t] > peaks[t] ? logits[n + t] : peaks[t];
    for (int width = 8; width; width /= 2)
        for (int t = 0; t < width; t++) peaks[t] = peaks[t + width] > peaks[t] ? peaks[t + width] : peaks[t];
    return peaks[0];
}

/* Exponentials of one head's tile against its own peak, summed by group (known when compiled). */
INLINE void exponentiate(const float *logits, float peak, const int group_tokens, float *sums) {
    float weights[TILE];
    for (int t = 0; t < TILE; t++) weights[t] = exp_below_zero(logits[t] - peak);
    for (int g = 0; g < TILE / group_tokens; g++) {
        float sum = 0.0f;
        for (int t = 0; t < group_tokens; t++) sum += weights[g * group_tokens + t];
        sums[g] = sum;
    }
}

#define BY_POWER(count, call)                   \
    switch (count) {                            \
    case 1: { enum { N = 1 }; call; break; }    \
    case 2: { enum { N = 2 }; call; break; }    \
    case 4: { enum { N = 4 }; call; break; }    \
    case 8: { enum { N = 8 }; call; break; }    \
    case 16: { enum { N = 16 }; call; break; }  \
    case 32: { enum { N = 32 }; call; break; }  \
    default: { enum { N = TILE }; call; break; } \
    }

/* Scratch of one worker, in this order, from the start of a cache line on. */
typedef struct {
    void *unpacked; /* of Products: rank * TILE int16, at least RUN * TILE */
    float *logits;  /* [heads, TILE] */
    float *tops;    /* [heads]: the largest logit seen */
    Queries queries;
} Scratch;

/* Levels of a query: rows rounded up to four, so that they can be taken four at a time. */
INLINE int64_t levels(int64_t rows, int64_t bits) { return (rows + 3) / 4 * 4 * (8 / bits); }

INLINE int64_t unpacked_floats(int64_t rank) { return (rank < RUN ? RUN : rank) * TILE / 2; }

/* Floats of a worker's scratch, whole cache lines. */
INLINE int64_t worker_floats(int64_t rows, int64_t bits, int64_t heads) {
    const int64_t rank = levels(rows, bits);
    return (32 + unpacked_floats(rank) + heads * (TILE + 3 + rank / 4)) / 16 * 16;
}

/* A worker's scratch with queries [heads, rows * 8 / bits] times `scales`, rounded to LEVELS. */
INLINE Scratch prepare(float *scratch, const float *query, const float *scales, int64_t rows, int64_t bits,
                    int64_t heads) {
    const int64_t parts = 8 / bits, rank = levels(rows, bits), stride = rank / parts;
    Scratch own;
    own.unpacked = (void *)(((uintptr_t)scratch + 63) / 64 * 64);
    own.logits = (float *)own.unpacked + unpacked_floats(rank);
    own.tops = own.logits + heads * TILE;
    float *steps = own.tops + heads;
    int32_t *starts = (int32_t *)(steps + heads);
    int8_t *rounded = (int8_t *)(starts + heads);
    memset(rounded, 0, (size_t)(heads * rank));
    for (int64_t h = 0; h < heads; h++) {
        const float *row = query + h * rows * parts;
        float most = 1e-30f;
        int32_t sum = 0;
        for (int64_t r = 0; r < rows * parts; r++) {
            const float size = fabsf(row[r] * scales[r]);
            most = size > most || size != size ? size : most; /* not a number once, and always from there on */
        }
        steps[h] = most / LEVELS;
        for (int64_t k = 0; k < parts; k++)
            for (int64_t r = 0; r < rows; r++) {
                const float level = row[k * rows + r] * scales[k * rows + r] / steps[h];
                const int32_t whole = level != level ? 0 : (int32_t)(level + (level < 0 ? -0.5f : 0.5f));
                rounded[h * rank + k * stride + r] = (int8_t)whole;
                sum += whole;
            }
        starts[h] = -sum * (1 << (bits - 1));
        own.tops[h] = -INFINITY;
    }
    own.queries = (Queries){heads, rank, stride, rounded, starts, steps};
    return own;
}

/* From sums of exponentials by group against the peaks of their tiles to the softmax over all of them, over heads. */
INLINE void merge_tiles(const float *sums, float *peaks, int64_t heads, int64_t tiles, int64_t per_tile, int64_t groups,
                        float *mass) {
    for (int64_t g = 0; g < groups; g++) mass[g] = 0.0f;
    for (int64_t h = 0; h < heads; h++) {
        float *factors = peaks + h * tiles, top = -INFINITY, all = 0.0f;
        const float *from = sums + h * tiles * per_tile;
        for (int64_t b = 0; b < tiles; b++) top = factors[b] > top ? factors[b] : top;
        for (int64_t b = 0; b < tiles; b++) {
            float sum = 0.0f;
            for (int64_t g = 0; g < per_tile; g++) sum += from[b * per_tile + g];
            factors[b] = exp_below_zero(factors[b] - top);
            all += sum * factors[b];
        }
        for (int64_t b = 0; b < tiles; b++) {
            const float factor = factors[b] / all;
            const int64_t stop = (b + 1) * per_tile < groups ? (b + 1) * per_tile : groups;
            for (int64_t g = b * per_tile; g < stop; g++) mass[g] += from[g] * factor;
        }
    }
}

/* What is shared out to workers; what is not explained here is explained with kvswap_group_mass. */
typedef struct {
    const uint8_t *codes;
    int64_t sequence_bytes, tile_bytes, rows, bits;
    const float *query, *scales;
    int64_t heads;
    const int64_t *tokens;
    int64_t group_tokens;
    const int64_t *which;
    float *mass;
    int64_t groups;
    Products *products;
    int64_t parts;    /* of each sequence's tiles */
    float *partial;   /* of each sequence: sums [heads, tiles * TILE / group_tokens], then peaks [heads, tiles] */
    int64_t partial_floats;
    float *scratch;   /* of each worker, worker_floats apart */
    int64_t worker_floats;
} Scoring;

/* One part of one sequence's tiles: sums of exponentials by group, and peaks. */
CLONES static void score_part(const void *task, int64_t item, int64_t worker) {
    const Scoring *all = task;
    const int64_t b = item / all->parts, part = item % all->parts, heads = all->heads;
    const int64_t tokens = all->tokens[b], tiles = (tokens + TILE - 1) / TILE, per_tile = TILE / all->group_tokens;
    const int64_t stop = tiles * (part + 1) / all->parts;
    float *sums = all->partial + b * all->partial_floats, *peaks = sums + heads * tiles * per_tile;
    const float *query = all->query + b * heads * all->rows * (8 / all->bits);
    Scratch own = prepare(all->scratch + worker * all->worker_floats, query, all->scales, all->rows, all->bits, heads);
    for (int64_t n = tiles * part / all->parts; n < stop; n++) {
        const uint8_t *tile = all->codes + b * all->sequence_bytes + (all->which ? all->which[n] : n) * all->tile_bytes;
        all->products(tile, all->rows, all->bits, &own.queries, own.unpacked, own.logits);
        for (int64_t h = 0; h < heads; h++) {
            float *logits = own.logits + h * TILE, *to = sums + (h * tiles + n) * per_tile;
            for (int64_t t = tokens - n * TILE; t < TILE; t++) logits[t] = -INFINITY;
            const float peak = peaks[h * tiles + n] = largest(logits);
            if (peak < own.tops[h] - NOTHING) {
                memset(to, 0, (size_t)per_tile * sizeof *to);
                continue;
            }
            own.tops[h] = peak > own.tops[h] ? peak : own.tops[h];
            BY_POWER(all->group_tokens, exponentiate(logits, peak, N, to))
        }
    }
}

/* The mass of one sequence's groups from what score_part left. */
CLONES static void merge_sequence(const void *task, int64_t b, int64_t worker) {
    const Scoring *all = task;
    const int64_t tokens = all->tokens[b], tiles = (tokens + TILE - 1) / TILE, per_tile = TILE / all->group_tokens;
    const int64_t groups = tokens / all->group_tokens;
    float *sums = all->partial + b * all->partial_floats, *mass = all->mass + b * all->groups;
    (void)worker;
    merge_tiles(sums, sums + all->heads * tiles * per_tile, all->heads, tiles, per_tile, groups, mass);
    memset(mass + groups, 0, (size_t)(all->groups - groups) * sizeof *mass);
}

/* Floats of scratch for scoring `batch` sequences of up to `tiles` tiles by `workers`. */
EXPORT int64_t kvswap_scratch_floats(int64_t rows, int64_t bits, int64_t heads, int64_t tiles, int64_t group_tokens,
                                     int64_t batch, int64_t workers) {
    return workers * worker_floats(rows, bits, heads) + batch * heads * tiles * (TILE / group_tokens + 1);
}

/* Estimated attention mass of each group, summed over heads: what a softmax over all tokens gives them.
 *
 * codes    packed, by sequences `sequence_bytes` and tiles `tile_bytes` apart, each tile [rows, TILE] bytes
 * bits     2 or 4
 * query    [batch, heads, rank], rank = rows * 8 / bits, and what its columns are multiplied by, [rank]
 * tokens   [batch] that count, whole groups; group_tokens divides TILE
 * which    the tiles to score, ascending, or NULL for all of them; then `tokens` is what all the chosen hold
 * kind     of products, see products.c; returns whether this processor has it, otherwise nothing was done
 * scratch  kvswap_scratch_floats
 * mass     [batch, groups]: zero past a sequence's end
 */
EXPORT int64_t kvswap_group_mass(const uint8_t *codes, int64_t sequence_bytes, int64_t tile_bytes, int64_t rows,
                                 int64_t bits, const float *query, const float *scales, int64_t batch, int64_t heads,
                                 const int64_t *tokens, int64_t group_tokens, const int64_t *which, int64_t kind,
                                 int64_t workers, float *scratch, float *mass, int64_t groups) {
    const int64_t size = worker_floats(rows, bits, heads);
    int64_t longest = 0;
    for (int64_t b = 0; b < batch; b++) longest = tokens[b] > longest ? tokens[b] : longest;
    const int64_t tiles = (longest + TILE - 1) / TILE, each = heads * tiles * (TILE / group_tokens + 1);
    const int64_t parts = workers > 1 ? (PARTS * workers + batch - 1) / batch : 1;
    const Scoring all = {codes, sequence_bytes, tile_bytes, rows, bits, query, scales, heads, tokens, group_tokens, which,
                         mass, groups, kvswap_products(kind), parts, scratch + workers * size, each, scratch, size};
    if (all.products == NULL) return 0;
    kvswap_do_all(score_part, &all, batch * parts, workers);
    kvswap_do_all(merge_sequence, &all, batch, workers);
    return 1;
}

/* What is shared out to workers; the letters are those of kvswap_tile_mass. */
typedef struct {
    const uint8_t *codes;
    int64_t tile_bytes, rows, bits;
    const float *query, *scales;
    int64_t heads, tiles, parts;
    float *peaks, *scratch;
    int64_t worker_floats;
} Coarse;

/* The best product of one rounded query with the tokens of a tile, four rows at a time; rank is at most RUN, so that 16
 * bits are enough, and rows up to the next multiple of four are zero. */
INLINE int16_t best_product(const int16_t *query, int64_t rank, const int16_t *codes) {
    int16_t sums[TILE] = {0}, best = INT16_MIN;
    for (int64_t first = 0; first < rank; first += 4) {
        const int16_t *q = query + first, *row = codes + first * TILE;
        for (int t = 0; t < TILE; t++)
            sums[t] = (int16_t)(sums[t] + q[0] * row[t] + q[1] * row[TILE + t] + q[2] * row[2 * TILE + t] +
                                q[3] * row[3 * TILE + t]);
    }
    for (int t = 0; t < TILE; t++) best = sums[t] > best ? sums[t] : best;
    return best;
}

/* Each head's best logit in one part of the tiles. Of few rows the products are little beside what comes after them, so
 * they stay integers of 16 bits up to the best. */
CLONES static void peaks_of_part(const void *task, int64_t part, int64_t worker) {
    const Coarse *all = task;
    const int64_t stop = all->tiles * (part + 1) / all->parts, rows = all->rows, rank = rows * (8 / all->bits);
    float *scratch = all->scratch + worker * all->worker_floats;
    Scratch own = prepare(scratch, all->query, all->scales, rows, all->bits, all->heads);
    int16_t *compact = (int16_t *)own.logits, *codes = own.unpacked; /* [heads, RUN], [RUN, TILE]: the rest is zero */
    memset(compact, 0, (size_t)(all->heads * RUN) * sizeof *compact);
    memset(codes, 0, (size_t)(RUN * TILE) * sizeof *codes);
    for (int64_t h = 0; h < all->heads; h++)
        for (int64_t r = 0; r < rank; r++) {
            const int64_t place = r / rows * own.queries.stride + r % rows;
            compact[h * RUN + r] = own.queries.rounded[h * own.queries.rank + place];
        }
    for (int64_t n = all->tiles * part / all->parts; n < stop; n++) {
        const uint8_t *tile = all->codes + n * all->tile_bytes, *later = tile + AHEAD * all->tile_bytes;
        if (n + AHEAD < stop) /* tiles in between are skipped, so the processor cannot predict the address */
            for (int64_t r = 0; r < rows; r++) PREFETCH(later + r * TILE);
        if (all->bits == 2)
            unpack(tile, rows, rows, 2, codes);
        else
            unpack(tile, rows, rows, 4, codes);
        for (int64_t h = 0; h < all->heads; h++) {
            const int16_t best = best_product(compact + h * RUN, rank, codes);
            all->peaks[h * all->tiles + n] = own.queries.steps[h] * best;
        }
    }
}

/* Coarse scores of tiles: each head's best logit in a tile, softmax over tiles, summed over heads.
 *
 * The arguments are those of kvswap_group_mass for one sequence; tokens is a multiple of TILE, rank at most RUN.
 *
 * scratch  kvswap_scratch_floats with groups of TILE tokens
 * mass     [tokens / TILE]
 */
CLONES EXPORT void kvswap_tile_mass(const uint8_t *codes, int64_t tile_bytes, int64_t rows, int64_t bits,
                                    const float *query, const float *scales, int64_t heads, int64_t tokens,
                                    int64_t workers, float *scratch, float *mass) {
    const int64_t tiles = tokens / TILE, size = worker_floats(rows, bits, heads);
    float *peaks = scratch + workers * size;
    const Coarse all = {codes, tile_bytes, rows, bits, query, scales, heads, tiles, workers, peaks, scratch, size};
    kvswap_do_all(peaks_of_part, &all, workers, workers);
    for (int64_t n = 0; n < tiles; n++) mass[n] = 0.0f;
    for (int64_t h = 0; h < heads; h++) {
        float *row = peaks + h * tiles, top = -INFINITY, sum = 0.0f;
        for (int64_t n = 0; n < tiles; n++) top = row[n] > top ? row[n] : top;
        for (int64_t n = 0; n < tiles; n++) row[n] = exp_below_zero(row[n] - top); /* apart, since sums keep an order */
        for (int64_t n = 0; n < tiles; n++) sum += row[n];
        for (int64_t n = 0; n < tiles; n++) mass[n] += row[n] / sum;
    }
}

/* Whether any of BLOCK values is `limit` or more. */
INLINE int any_from(const float *values, float limit) {
    int any = 0;
    for (int i = 0; i < BLOCK; i++) any |= values[i] >= limit;
    return any;
}

/* The `count` best groups of [first, end), in ascending order; of equals at the limit, the first ones. Returns how many
 * were found, which is less where the range is shorter.
 *
 * scores   [end], finite
 * scratch  [end - first]
 * picked   [count]
 */
INLINE int64_t best_groups(const float *scores, int64_t first, int64_t end, int64_t count, float *scratch,
                                 int64_t *picked) {
    int64_t size = 0, found = 0, equals = 0;
    if (end - first <= count) {
        for (int64_t g = first; g < end; g++) picked[found++] = g;
        return found;
    }
    for (int64_t g = first; g < end; g += BLOCK) { /* most are zero after two levels: look among the others */
        const int64_t stop = g + BLOCK < end ? g + BLOCK : end;
        if (stop - g == BLOCK && !any_from(scores + g, FLT_MIN)) continue;
        for (int64_t i = g; i < stop; i++) {
            scratch[size] = scores[i];
            size += scores[i] >= FLT_MIN;
        }
    }
    if (size < count) {
        size = end - first;
        memcpy(scratch, scores + first, (size_t)size * sizeof *scratch);
    }
    const float limit = threshold(scratch, size, count);
    for (int64_t g = 0; g < count; g++) equals += scratch[g] == limit;  /* the best `count` come first now */
    for (int64_t g = first; g < end; g += BLOCK) {
        const int64_t stop = g + BLOCK < end ? g + BLOCK : end;
        if (stop - g == BLOCK && !any_from(scores + g, limit)) continue;
        for (int64_t i = g; i < stop; i++)
            if (scores[i] > limit || (scores[i] == limit && equals-- > 0)) picked[found++] = i;
    }
    return found;
}

/* best_groups of each row of scores [rows, groups]: picked [rows, count], filled up with `groups`. */
CLONES EXPORT void kvswap_top_groups(const float *scores, int64_t rows, int64_t groups, int64_t first, const int64_t *ends,
                              int64_t count, float *scratch, int64_t *picked) {
    for (int64_t b = 0; b < rows; b++) {
        int64_t *to = picked + b * count;
        const int64_t end = ends[b] < first ? first : ends[b];
        for (int64_t n = best_groups(scores + b * groups, first, end, count, scratch, to); n < count; n++)
            to[n] = groups;
    }
}

EXPORT int64_t kvswap_version(void) { return VERSION; }
