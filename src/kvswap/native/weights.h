/* Matrices of weights as a file has them, multiplied by vectors without being unpacked.
 *
 * A matrix is rows of blocks of the GGUF format, or of floats. Codes of 4 to 8 bits are multiplied as integers: a vector
 * is rounded by blocks first, once for all matrices whose types have the same activation kind: to 8 bits, and what is
 * left of it to 8 more, which only some matrices take. Sums of integers are exact, and floats are added in one order, so
 * that every kind of product gives the same bits.
 */
#ifndef KVSWAP_WEIGHTS_H
#define KVSWAP_WEIGHTS_H

#include "common.h"

enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30 };

/* One matrix as it lies in memory. */
typedef struct {
    const uint8_t *data;   /* first row */
    int64_t type;          /* the number that GGUF gives it, one of the above */
    int64_t rows, columns; /* outputs, inputs */
    int64_t row_bytes;
    int64_t paired_rows; /* 0, or rows of a head that lie in the order of pairs: row i of its first half is 2 * i */
    int64_t fine;        /* whether vectors count with 16 bits instead of 8, for up to twice the time */
} kvswap_matrix;

#define VECTORS 8 /* at most, in one product */

/* Bytes of a row, or -1: a type that is not known, or columns that are no whole blocks of it. */
EXPORT int64_t kvswap_row_bytes(int64_t type, int64_t columns);

/* How vectors are rounded for a type: 0 not at all, 1 by blocks of 32, 2 by blocks of 256; -1 for an unknown type. */
EXPORT int64_t kvswap_activation_kind(int64_t type);

/* Room for one rounded vector, a multiple of 64. */
EXPORT int64_t kvswap_activation_bytes(int64_t type, int64_t columns);

/* Round a vector, with what is left of it where `fine` matrices need it; what is not finite makes its block, and so the
 * product, not a number. */
EXPORT void kvswap_round_activation(int64_t type, int64_t fine, const float *x, int64_t columns, void *rounded);

/* y[first..last) = these rows times the vector. One thread: callers share out rows. */
EXPORT void kvswap_multiply_rows(const kvswap_matrix *m, const void *rounded, int64_t first, int64_t last, float *y);

/* Rows [first, last) as floats, [last - first, columns], the same bits as gguf.dequantize. */
EXPORT void kvswap_unpack_rows(const kvswap_matrix *m, int64_t first, int64_t last, float *out);

/* kvswap_multiply_rows for `count` vectors, up to VECTORS: vector n lies `rounded_bytes` after the one before it, and its
 * products `stride` after those before. `kind` 0 is the best that this processor has, 1 plain C; see weights_dot.c.
 * Returns whether the processor has this kind. */
int64_t kvswap_multiply_many(const kvswap_matrix *m, const void *rounded, int64_t rounded_bytes, int64_t count,
                             int64_t first, int64_t last, float *y, int64_t stride, int64_t kind);

#endif
