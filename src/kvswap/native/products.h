/* Products of queries with tiles of packed codes, and what both sides agree on. */
#ifndef KVSWAP_PRODUCTS_H
#define KVSWAP_PRODUCTS_H

#include "common.h"

#define TILE 64    /* tokens; groups divide it, and rows of codes may be read up to its multiples */
#define HEADS 4    /* query heads at once: their sums stay in vector registers */
#define LEVELS 127 /* of a rounded query, either side of zero */
#define RUN 32     /* products of 4-bit codes and queries whose sum fits 16 bits: 8 * LEVELS * RUN < 2^15 */

#define BY_COUNT(count, call)                     \
    switch (count) {                              \
    case 1: { enum { N = 1 }; call; break; }      \
    case 2: { enum { N = 2 }; call; break; }      \
    case 3: { enum { N = 3 }; call; break; }      \
    default: { enum { N = HEADS }; call; break; } \
    }

/* One tile of codes less their middle, row k * stride + r from the k-th bits of byte row r. */
INLINE void unpack(const uint8_t *codes, int64_t rows, int64_t stride, const int bits, int16_t *out) {
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = codes + r * TILE;
        for (int k = 0; k < 8 / bits; k++) {
            int16_t *to = out + (k * stride + r) * TILE;
            for (int t = 0; t < TILE; t++)
                to[t] = (int16_t)(((row[t] >> (k * bits)) & ((1 << bits) - 1)) - (1 << (bits - 1)));
        }
    }
}

/* Queries of `heads` heads, each rounded to `rank` levels: what a level is worth by head, and what a sum of products
 * with codes begins with, since codes count from their middle. Bits k of byte row r have level k * stride + r; stride
 * is a multiple of four, levels of rows that there are not are zero. */
typedef struct {
    int64_t heads, rank, stride;
    const int8_t *rounded;
    const int32_t *starts;
    const float *steps;
} Queries;

/* Logits [heads, TILE] of one tile of codes [rows, TILE]; scratch of rank * TILE int16, by 64 bytes. */
typedef void Products(const uint8_t *tile, int64_t rows, int64_t bits, const Queries *queries, void *scratch,
                      float *logits);

Products *kvswap_products(int64_t kind);

#endif
