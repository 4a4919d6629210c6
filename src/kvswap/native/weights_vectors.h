/* Vectors of one width for all processors, formats of blocks, and rounded vectors: what weights.c and weights_dot.c share.
 *
 * Compilers make two instructions of one where registers are half as wide. The types are not passed between files.
 */
#ifndef KVSWAP_WEIGHTS_VECTORS_H
#define KVSWAP_WEIGHTS_VECTORS_H

#include "weights.h"

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t s8x32 __attribute__((vector_size(32)));
typedef int16_t s16x8 __attribute__((vector_size(16)));
typedef int32_t s32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));

#define SHORT 32 /* elements of a block of the types Q4_0 to Q8_0 */
#define LONG 256 /* of the types that end in K */

/* Bytes of a block. */
#define SHORT_BYTES(type) ((type) == Q4_0 ? 18 : (type) == Q4_1 ? 20 : (type) == Q5_0 ? 22 : (type) == Q5_1 ? 24 : 34)
#define LONG_BYTES(type) ((type) == Q4_K ? 144 : (type) == Q5_K ? 176 : 210)

/* Where a row lies. */
INLINE const uint8_t *row_at(const kvswap_matrix *m, int64_t row) {
    if (m->paired_rows) {
        const int64_t half = m->paired_rows / 2, i = row % m->paired_rows;
        row += (i < half ? 2 * i : 2 * (i - half) + 1) - i;
    }
    return m->data + row * m->row_bytes;
}

#define AHEAD 2048 /* bytes; half and four times as many were slower */

/* Have the `bytes` that come AHEAD of here brought into the nearest cache. Rows of packed weights are short, and processors
 * do not guess that the next ones follow: without this a product with weights from memory takes twice as long. */
INLINE void prefetch(const uint8_t *from, const int bytes) {
    for (int i = 0; i < bytes; i += 64) PREFETCH(from + AHEAD + i);
}

/* A rounded vector; which members there are depends on its kind. */
typedef struct {
    const float *floats; /* kind 0: [columns] */
    const int8_t *codes; /* [columns], of -127 to 127 */
    const float *steps;  /* of a block: what a code is worth */
    const float *sums;   /* of 32 rounded elements */
    const float *sum16;  /* kind 2: of 16 */
} Vector;

/* The functions of one kind of product; y begins with row `first`. */
typedef void MultiplyRows(const kvswap_matrix *m, const Vector *x, int64_t count, int64_t first, int64_t last, float *y,
                          int64_t stride);
typedef void UnpackRows(const kvswap_matrix *m, int64_t first, int64_t last, float *out);

typedef struct {
    MultiplyRows *multiply;
    UnpackRows *unpack;
} WeightProducts;

const WeightProducts *kvswap_weight_products(int64_t kind);

#endif
