/* Products of queries with tiles of packed codes, and what both sides agree on. */
#ifndef KVSWAP_PRODUCTS_H
#define KVSWAP_PRODUCTS_H

#include "common.h"

#define TILE 64    /* tokens; groups divide it, and rows of codes may be read up to its multiples */
#define HEADS 4    /* query heads at once: their sums stay in vector registers */
#define LEVELS 127 /* of a rounded query, either side of zero */

#define BY_COUNT(count, call)                     \
    switch (count) {                              \
    case 1: { enum { N = 1 }; call; break; }      \
    case 2: { enum { N = 2 }; call; break; }      \
    case 3: { enum { N = 3 }; call; break; }      \
    default: { enum { N = HEADS }; call; break; } \
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
