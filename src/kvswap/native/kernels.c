/* Scoring of packed codes in one pass: unpack, multiply, exponentiate, sum by group; and the choice of the best groups.
 *
 * Plain C without Python or NumPy headers, called through ctypes. Everything here has a plain twin in torch that the
 * tests hold it against. Loops over TILE tokens have a constant length, so that a compiler turns them into vectors of
 * whatever width the processor has.
 */
#include <math.h>

#include "common.h"

#define VERSION 6   /* of the functions' arguments; library.py must have the same */
#define TILE 64     /* tokens; groups divide it, and rows of codes may be read up to its multiples */
#define HEADS 4     /* query heads at once: their sums stay in vector registers */
#define LEVELS 127  /* of a rounded query, either side of zero */
#define AHEAD 8     /* tiles */
#define RUN 32      /* products of 4-bit codes and queries whose sum fits 16 bits: 8 * LEVELS * RUN < 2^15 */

/* exp(x) for x <= 0 to 2e-7 relative: 2^n by the exponent's bits, 2^f on [-1/2, 1/2] by its Taylor polynomial. */
INLINE float exp_below_zero(float x) {
    float t = (x < -87.0f ? -87.0f : x) * 1.44269504f;
    float n = (t + 12582912.0f) - 12582912.0f;
    float f = t - n;
    float p = 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    int32_t bits;
    memcpy(&bits, &p, 4);
    bits += (int32_t)n << 23;
    memcpy(&p, &bits, 4);
    return p;
}

/* One tile of codes less their middle, row k * rows + r from the k-th bits of byte row r. */
INLINE void unpack(const uint8_t *codes, int64_t rows, const int bits, int16_t *out) {
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = codes + r * TILE;
        for (int k = 0; k < 8 / bits; k++) {
            int16_t *to = out + (k * rows + r) * TILE;
            for (int t = 0; t < TILE; t++)
                to[t] = (int16_t)(((row[t] >> (k * bits)) & ((1 << bits) - 1)) - (1 << (bits - 1)));
        }
    }
}

/* Products of `heads` (known when compiled) rounded queries with one tile: [heads, TILE], times each head's step. */
INLINE void multiply(const int16_t *query, const float *steps, int64_t rank, const int16_t *codes, const int heads,
                     float *out) {
    int32_t sums[HEADS][TILE];
    memset(sums, 0, sizeof sums);
    for (int64_t first = 0; first < rank; first += RUN) {
        const int64_t stop = first + RUN < rank ? first + RUN : rank;
        int16_t part[HEADS][TILE];
        memset(part, 0, sizeof part);
        for (int64_t r = first; r < stop; r++)
            for (int h = 0; h < heads; h++) {
                const int16_t q = query[h * rank + r];
                for (int t = 0; t < TILE; t++) part[h][t] = (int16_t)(part[h][t] + q * codes[r * TILE + t]);
            }
        for (int h = 0; h < heads; h++)
            for (int t = 0; t < TILE; t++) sums[h][t] += part[h][t];
    }
    for (int h = 0; h < heads; h++)
        for (int t = 0; t < TILE; t++) out[h * TILE + t] = (float)sums[h][t] * steps[h];
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

/* Exponentials of one head's tile against its own peak, summed by group (known when compiled); returns the peak. */
INLINE float exponentiate(float *logits, int64_t valid, const int group_tokens, float *sums) {
    float weights[TILE];
    if (valid < TILE)
        for (int t = 0; t < TILE; t++) logits[t] = t < valid ? logits[t] : -INFINITY;
    const float peak = largest(logits);
    for (int t = 0; t < TILE; t++) weights[t] = exp_below_zero(logits[t] - peak);
    for (int g = 0; g < TILE / group_tokens; g++) {
        float sum = 0.0f;
        for (int t = 0; t < group_tokens; t++) sum += weights[g * group_tokens + t];
        sums[g] = sum;
    }
    return peak;
}

#define BY_COUNT(count, call)                   \
    switch (count) {                            \
    case 1: { enum { N = 1 }; call; break; }    \
    case 2: { enum { N = 2 }; call; break; }    \
    case 3: { enum { N = 3 }; call; break; }    \
    default: { enum { N = HEADS }; call; break; } \
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

/* Queries [heads, rank] times `scales` [rank], rounded to LEVELS; `steps` [heads] is what one level is worth. */
INLINE void round_queries(const float *query, const float *scales, int64_t heads, int64_t rank, int16_t *rounded,
                          float *steps) {
    for (int64_t h = 0; h < heads; h++) {
        const float *row = query + h * rank;
        float largest = 1e-30f;
        for (int64_t r = 0; r < rank; r++) {
            const float size = fabsf(row[r] * scales[r]);
            largest = size > largest ? size : largest;
        }
        steps[h] = largest / LEVELS;
        for (int64_t r = 0; r < rank; r++) {
            const float level = row[r] * scales[r] / steps[h];
            rounded[h * rank + r] = (int16_t)(level + (level < 0 ? -0.5f : 0.5f));
        }
    }
}

/* From sums of exponentials by group against the peaks of their tiles to the softmax over all of them, over heads. */
INLINE void merge_tiles(float *sums, float *peaks, int64_t heads, int64_t tiles, int64_t per_tile, int64_t groups,
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

/* Estimated attention mass of each group, summed over heads: what a softmax over all tokens gives them.
 *
 * codes    packed, by tiles `tile_bytes` apart, each [rows, TILE] bytes; `tokens` of them count
 * bits     2 or 4
 * query    [heads, rank], rank = rows * 8 / bits, and what its columns are multiplied by, [rank]
 * scratch  heads * (tiles * (TILE / group_tokens + 1) + 1) floats and (heads + TILE) * rank int16, in this order, where
 *          tiles = tokens / TILE rounded up
 * which    the tiles to score, ascending, [tiles], or NULL for all of them; then `tokens` is what all the chosen hold
 * mass     [tokens / group_tokens]; group_tokens divides TILE and tokens
 */
CLONES EXPORT void kvswap_group_mass(const uint8_t *codes, int64_t tile_bytes, int64_t rows, int64_t bits,
                                     const float *query, const float *scales, int64_t heads, int64_t tokens,
                                     int64_t group_tokens, const int64_t *which, float *scratch, float *mass) {
    const int64_t rank = rows * (8 / bits), per_tile = TILE / group_tokens, tiles = (tokens + TILE - 1) / TILE;
    float *sums = scratch, *peaks = sums + heads * tiles * per_tile, *steps = peaks + heads * tiles;
    int16_t *rounded = (int16_t *)(steps + heads), *unpacked = rounded + heads * rank;
    float logits[HEADS * TILE];
    round_queries(query, scales, heads, rank, rounded, steps);
    for (int64_t b = 0; b < tiles; b++) {
        const uint8_t *tile = codes + (which ? which[b] : b) * tile_bytes;
        const int64_t valid = tokens - b * TILE < TILE ? tokens - b * TILE : TILE;
        if (bits == 2)
            unpack(tile, rows, 2, unpacked);
        else
            unpack(tile, rows, 4, unpacked);
        for (int64_t first = 0; first < heads; first += HEADS) {
            const int64_t count = heads - first < HEADS ? heads - first : HEADS;
            BY_COUNT(count, multiply(rounded + first * rank, steps + first, rank, unpacked, N, logits))
            for (int64_t n = 0; n < count; n++) {
                const int64_t h = first + n;
                float *to = sums + (h * tiles + b) * per_tile;
                BY_POWER(group_tokens, peaks[h * tiles + b] = exponentiate(logits + n * TILE, valid, N, to))
            }
        }
    }
    merge_tiles(sums, peaks, heads, tiles, per_tile, tokens / group_tokens, mass);
}

/* The best product of one rounded query with the tokens of a tile; rank is at most RUN, so that 16 bits are enough. */
INLINE int16_t best_product(const int16_t *query, int64_t rank, const int16_t *codes) {
    int16_t sums[TILE];
    memset(sums, 0, sizeof sums);
    for (int64_t r = 0; r < rank; r++)
        for (int t = 0; t < TILE; t++) sums[t] = (int16_t)(sums[t] + query[r] * codes[r * TILE + t]);
    int16_t best = INT16_MIN;
    for (int t = 0; t < TILE; t++) best = sums[t] > best ? sums[t] : best;
    return best;
}

/* What tiles promise: each head's best logit in them, softmax over tiles, summed over heads. For coarse scores.
 *
 * The arguments are those of kvswap_group_mass; tokens is a multiple of TILE, rows * 8 / bits at most RUN.
 *
 * scratch  heads * (tiles + 1) floats and (heads + TILE) * rank int16, in this order
 * mass     [tokens / TILE]
 */
CLONES EXPORT void kvswap_tile_mass(const uint8_t *codes, int64_t tile_bytes, int64_t rows, int64_t bits,
                                    const float *query, const float *scales, int64_t heads, int64_t tokens,
                                    float *scratch, float *mass) {
    const int64_t rank = rows * (8 / bits), tiles = tokens / TILE;
    float *peaks = scratch, *steps = peaks + heads * tiles;
    int16_t *rounded = (int16_t *)(steps + heads), *unpacked = rounded + heads * rank;
    round_queries(query, scales, heads, rank, rounded, steps);
    for (int64_t b = 0; b < tiles; b++) {
        const uint8_t *tile = codes + b * tile_bytes, *later = tile + AHEAD * tile_bytes;
        if (b + AHEAD < tiles) /* what lies between is skipped, which the processor does not foresee */
            for (int64_t r = 0; r < rows; r++) PREFETCH(later + r * TILE);
        if (bits == 2)
            unpack(tile, rows, 2, unpacked);
        else
            unpack(tile, rows, 4, unpacked);
        for (int64_t h = 0; h < heads; h++)
            peaks[h * tiles + b] = steps[h] * best_product(rounded + h * rank, rank, unpacked);
    }
    for (int64_t b = 0; b < tiles; b++) mass[b] = 0.0f;
    for (int64_t h = 0; h < heads; h++) {
        float *row = peaks + h * tiles, top = -INFINITY, all = 0.0f;
        for (int64_t b = 0; b < tiles; b++) top = row[b] > top ? row[b] : top;
        for (int64_t b = 0; b < tiles; b++) {
            row[b] = exp_below_zero(row[b] - top);
            all += row[b];
        }
        for (int64_t b = 0; b < tiles; b++) mass[b] += row[b] / all;
    }
}

/* The `count` best groups of [first, end), in ascending order; of equals at the limit, the first ones. Returns how many
 * were found, which is less where the range is shorter.
 *
 * scores   [end], finite
 * scratch  [end - first]
 * picked   [count]
 */
EXPORT int64_t kvswap_top_groups(const float *scores, int64_t first, int64_t end, int64_t count, float *scratch,
                                 int64_t *picked) {
    int64_t size = 0, found = 0, equals = 0;
    if (end - first <= count) {
        for (int64_t g = first; g < end; g++) picked[found++] = g;
        return found;
    }
    for (int64_t g = first; g < end; g++) { /* most are zero after two levels: look among the others */
        scratch[size] = scores[g];
        size += scores[g] > 0.0f;
    }
    if (size < count) {
        size = end - first;
        memcpy(scratch, scores + first, (size_t)size * sizeof *scratch);
    }
    const float limit = threshold(scratch, size, count);
    for (int64_t g = 0; g < count; g++) equals += scratch[g] == limit;  /* the best `count` come first now */
    for (int64_t g = first; g < end; g++)
        if (scores[g] > limit || (scores[g] == limit && equals-- > 0)) picked[found++] = g;
    return found;
}

EXPORT int64_t kvswap_version(void) { return VERSION; }
