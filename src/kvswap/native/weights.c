/* Matrices of weights as a file has them: their formats, rounded vectors, and products shared out to workers. */
/* A product that is rounded on some processors and not on others would be another code: of vectors all have the same. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "weights_vectors.h"
#include "workers.h"

#define ALIGNED(bytes) (((bytes) + 63) / 64 * 64)
#define GRAIN 16384 /* weights from which a product is shared out: about five microseconds of work */

EXPORT int64_t kvswap_row_bytes(int64_t type, int64_t columns) {
    switch (type) {
    case F32: return columns * 4;
    case F16: case BF16: return columns * 2;
    case Q4_0: case Q4_1: case Q5_0: case Q5_1: case Q8_0:
        return columns % SHORT ? -1 : columns / SHORT * SHORT_BYTES(type);
    case Q4_K: case Q5_K: case Q6_K: return columns % LONG ? -1 : columns / LONG * LONG_BYTES(type);
    default: return -1;
    }
}

EXPORT int64_t kvswap_activation_kind(int64_t type) {
    switch (type) {
    case F32: case F16: case BF16: return 0;
    case Q4_0: case Q4_1: case Q5_0: case Q5_1: case Q8_0: return 1;
    case Q4_K: case Q5_K: case Q6_K: return 2;
    default: return -1;
    }
}

/* Room for one of the two vectors that a rounded vector consists of. */
static int64_t vector_bytes(int64_t kind, int64_t columns) {
    if (kind == 0) return ALIGNED(columns * 4);
    if (kind == 1) return ALIGNED(columns) + 2 * ALIGNED(columns / SHORT * 4);
    return ALIGNED(columns) + ALIGNED(columns / LONG * 4) + ALIGNED(columns / 32 * 4) + ALIGNED(columns / 16 * 4);
}

EXPORT int64_t kvswap_activation_bytes(int64_t type, int64_t columns) {
    const int64_t kind = kvswap_activation_kind(type);
    return (kind > 0 ? 2 : 1) * vector_bytes(kind, columns);
}

/* The vector at an address: of 8 bits, or of what they leave, which lies behind it. */
static Vector vector_at(int64_t kind, int64_t columns, const void *rounded, int fine) {
    const char *from = (const char *)rounded + (fine ? vector_bytes(kind, columns) : 0);
    Vector found = {(const float *)from, (const int8_t *)from, NULL, NULL, NULL};
    from += ALIGNED(columns);
    found.steps = (const float *)from;
    from += ALIGNED(columns / (kind == 1 ? SHORT : LONG) * 4);
    found.sums = (const float *)from;
    found.sum16 = (const float *)(from + ALIGNED(columns / 32 * 4));
    return found;
}

/* One block to codes, and what they leave, if `fine` is not NULL, to codes that count 256th parts; returns what a code is
 * worth. */
INLINE float round_block(const float *x, const int size, int8_t *codes, int8_t *fine) {
    uint32_t largest = 0;
    float most;
    for (int i = 0; i < size; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffffu;
        largest = bits > largest ? bits : largest; /* as floats are ordered, with what is not a number at the end */
    }
    memcpy(&most, &largest, 4);
    const int finite = largest < 0x7f800000u;
    const float factor = finite && most >= 1e-30f ? 127.0f / most : 0.0f;
    for (int i = 0; i < size; i++) {
        const float scaled = finite ? x[i] * factor : 0.0f;
        const int32_t code = (int32_t)(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
        codes[i] = (int8_t)code;
        if (fine == NULL) continue;
        const float rest = (scaled - (float)code) * 256.0f; /* -128 to 128: the ends are cut off */
        const int32_t part = (int32_t)(rest + (rest < 0.0f ? -0.5f : 0.5f));
        fine[i] = (int8_t)(part > 127 ? 127 : part < -127 ? -127 : part);
    }
    return finite ? most / 127.0f : __builtin_nanf(""); /* whose sign is the same on all processors */
}

INLINE int sum_codes(const int8_t *codes, const int size) {
    int sum = 0;
    for (int i = 0; i < size; i++) sum += codes[i];
    return sum;
}

/* Sums of a rounded vector whose codes and steps are there. */
INLINE void sum_short(const Vector *v, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) ((float *)v->sums)[b] = v->steps[b] * (float)sum_codes(v->codes + b * SHORT, SHORT);
}

INLINE void sum_long(const Vector *v, int64_t columns) {
    float *sums = (float *)v->sums, *sum16 = (float *)v->sum16;
    for (int64_t i = 0; i < columns / 32; i++) sums[i] = v->steps[i / 8] * (float)sum_codes(v->codes + i * 32, 32);
    for (int64_t i = 0; i < columns / 16; i++) sum16[i] = v->steps[i / 16] * (float)sum_codes(v->codes + i * 16, 16);
}

/* A vector by blocks of `size`, and, if it is given, what is left of it. */
INLINE void round_blocks(const float *x, int64_t columns, const int size, const Vector *coarse, const Vector *fine) {
    for (int64_t b = 0; b < columns / size; b++) {
        int8_t *codes = (int8_t *)coarse->codes + b * size, *parts = fine ? (int8_t *)fine->codes + b * size : NULL;
        const float step = round_block(x + b * size, size, codes, parts);
        ((float *)coarse->steps)[b] = step;
        if (fine) ((float *)fine->steps)[b] = step / 256.0f;
    }
    for (const Vector *v = coarse; v; v = v == coarse ? fine : NULL)
        if (size == SHORT)
            sum_short(v, columns / SHORT);
        else
            sum_long(v, columns);
}

CLONES static void round_short(const float *x, int64_t columns, const Vector *coarse) {
    round_blocks(x, columns, SHORT, coarse, NULL);
}

CLONES static void round_short_fine(const float *x, int64_t columns, const Vector *coarse, const Vector *fine) {
    round_blocks(x, columns, SHORT, coarse, fine);
}

CLONES static void round_long(const float *x, int64_t columns, const Vector *coarse) {
    round_blocks(x, columns, LONG, coarse, NULL);
}

CLONES static void round_long_fine(const float *x, int64_t columns, const Vector *coarse, const Vector *fine) {
    round_blocks(x, columns, LONG, coarse, fine);
}

EXPORT void kvswap_round_activation(int64_t type, int64_t fine, const float *x, int64_t columns, void *rounded) {
    const int64_t kind = kvswap_activation_kind(type);
    const Vector coarse = vector_at(kind, columns, rounded, 0), rest = vector_at(kind, columns, rounded, 1);
    if (kind == 0)
        memcpy(rounded, x, (size_t)columns * sizeof *x);
    else if (kind == 1 && !fine)
        round_short(x, columns, &coarse);
    else if (kind == 1)
        round_short_fine(x, columns, &coarse, &rest);
    else if (!fine)
        round_long(x, columns, &coarse);
    else
        round_long_fine(x, columns, &coarse, &rest);
}

#define FINE_ROWS 64 /* at a time: their products with what is left of vectors wait to be added */

/* Products with vectors of 16 bits: those with 8 bits, plus those with what is left. */
static void multiply_fine(const WeightProducts *products, const kvswap_matrix *m, const Vector *x, int64_t count,
                          int64_t first, int64_t last, float *y, int64_t stride) {
    float both[2 * VECTORS * FINE_ROWS];
    for (int64_t row = first; row < last; row += FINE_ROWS) {
        const int64_t end = row + FINE_ROWS < last ? row + FINE_ROWS : last;
        products->multiply(m, x, 2 * count, row, end, both, FINE_ROWS);
        for (int64_t n = 0; n < count; n++)
            for (int64_t i = 0; i < end - row; i++)
                y[n * stride + row + i] = both[2 * n * FINE_ROWS + i] + both[(2 * n + 1) * FINE_ROWS + i];
    }
}

int64_t kvswap_multiply_many(const kvswap_matrix *m, const void *rounded, int64_t rounded_bytes, int64_t count,
                             int64_t first, int64_t last, float *y, int64_t stride, int64_t kind) {
    const WeightProducts *products = kvswap_weight_products(kind);
    const int64_t activation = kvswap_activation_kind(m->type), each = m->fine && activation > 0 ? 2 : 1;
    Vector x[2 * VECTORS];
    if (products == NULL || count > VECTORS) return 0;
    for (int64_t n = 0; n < count * each; n++)
        x[n] = vector_at(activation, m->columns, (const char *)rounded + n / each * rounded_bytes, n % each == 1);
    if (each == 2)
        multiply_fine(products, m, x, count, first, last, y, stride);
    else
        products->multiply(m, x, count, first, last, y + first, stride);
    return 1;
}

EXPORT void kvswap_multiply_rows(const kvswap_matrix *m, const void *rounded, int64_t first, int64_t last, float *y) {
    kvswap_multiply_many(m, rounded, 0, 1, first, last, y, 0, 0);
}

EXPORT void kvswap_unpack_rows(const kvswap_matrix *m, int64_t first, int64_t last, float *out) {
    kvswap_weight_products(0)->unpack(m, first, last, out);
}

/* What is shared out to workers; the letters are those of kvswap_packed_linear. */
typedef struct {
    const kvswap_matrix *m;
    const char *rounded;
    int64_t rounded_bytes, count, kind, parts;
    const float *bias;
    float *y;
} Product;

/* First row of one of equal parts; parts begin at multiples of four rows, which are multiplied together. */
INLINE int64_t part_of(int64_t rows, int64_t part, int64_t parts) {
    return part == parts ? rows : rows * part / parts / 4 * 4;
}

static void multiply_part(const void *task, int64_t part, int64_t worker) {
    const Product *all = task;
    const int64_t rows = all->m->rows, first = part_of(rows, part, all->parts), last = part_of(rows, part + 1, all->parts);
    (void)worker;
    kvswap_multiply_many(all->m, all->rounded, all->rounded_bytes, all->count, first, last, all->y, rows, all->kind);
    if (all->bias)
        for (int64_t n = 0; n < all->count; n++)
            for (int64_t row = first; row < last; row++) all->y[n * rows + row] += all->bias[row];
}

/* y [count, rows] = x [count, columns] times the matrix, plus bias where there is one.
 *
 * count    up to VECTORS
 * scratch  count * kvswap_activation_bytes, by 64 bytes
 * kind     as for kvswap_multiply_many, whose result is returned
 */
EXPORT int64_t kvswap_packed_linear(const kvswap_matrix *m, const float *x, int64_t count, float *y, const float *bias,
                                    int64_t workers, void *scratch, int64_t kind) {
    const int64_t bytes = kvswap_activation_bytes(m->type, m->columns);
    const int64_t parts = m->rows * m->columns < GRAIN || m->rows < 4 * workers ? 1 : workers;
    const Product all = {m, scratch, bytes, count, kind, parts, bias, y};
    if (kvswap_weight_products(kind) == NULL || count > VECTORS) return 0;
    for (int64_t n = 0; n < count; n++)
        kvswap_round_activation(m->type, m->fine, x + n * m->columns, m->columns, (char *)scratch + n * bytes);
    kvswap_do_all(multiply_part, &all, parts, workers);
    return 1;
}

typedef struct {
    const kvswap_matrix *m;
    int64_t first, last, parts;
    float *out;
    const WeightProducts *products;
} Unpacking;

static void unpack_part(const void *task, int64_t part, int64_t worker) {
    const Unpacking *all = task;
    const int64_t rows = all->last - all->first, from = part_of(rows, part, all->parts);
    (void)worker;
    all->products->unpack(all->m, all->first + from, all->first + part_of(rows, part + 1, all->parts),
                          all->out + from * all->m->columns);
}

/* kvswap_unpack_rows by several workers, with the functions of one kind; returns whether the processor has it. */
EXPORT int64_t kvswap_unpack(const kvswap_matrix *m, int64_t first, int64_t last, float *out, int64_t workers,
                             int64_t kind) {
    const int64_t parts = (last - first) * m->columns < GRAIN ? 1 : workers;
    const Unpacking all = {m, first, last, parts, out, kvswap_weight_products(kind)};
    if (all.products == NULL) return 0;
    kvswap_do_all(unpack_part, &all, parts, workers);
    return 1;
}
