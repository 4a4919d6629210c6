/* Matrices of weights as a file has them: their formats, rounded vectors, and products shared out to workers. */
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

EXPORT int64_t kvswap_activation_bytes(int64_t type, int64_t columns) {
    const int64_t shorts = ALIGNED(columns / SHORT * 4);
    switch (kvswap_activation_kind(type)) {
    case 0: return ALIGNED(columns * 4);
    case 1: return ALIGNED(columns) + 2 * shorts;
    default: return ALIGNED(columns) + ALIGNED(columns / LONG * 4) + ALIGNED(columns / 16 * 2) + ALIGNED(columns / 32 * 2);
    }
}

Vector kvswap_rounded_vector(int64_t kind, int64_t columns, const void *rounded) {
    const char *from = rounded;
    Vector found = {rounded, rounded, NULL, NULL, NULL, NULL};
    from += ALIGNED(columns);
    found.steps = (const float *)from;
    if (kind == 1) {
        found.sums = (const float *)(from + ALIGNED(columns / SHORT * 4));
    } else if (kind == 2) {
        from += ALIGNED(columns / LONG * 4);
        found.sum16 = (const int16_t *)from;
        found.sum32 = (const int16_t *)(from + ALIGNED(columns / 16 * 2));
    }
    return found;
}

/* One block to codes; returns what a code is worth. */
INLINE float round_block(const float *x, const int size, int8_t *codes) {
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
        codes[i] = (int8_t)(int32_t)(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
    }
    return finite ? most / 127.0f : most - most;
}

INLINE int sum_codes(const int8_t *codes, const int size) {
    int sum = 0;
    for (int i = 0; i < size; i++) sum += codes[i];
    return sum;
}

CLONES static void round_short(const float *x, int64_t columns, int8_t *codes, float *steps, float *sums) {
    for (int64_t b = 0; b < columns / SHORT; b++) {
        steps[b] = round_block(x + b * SHORT, SHORT, codes + b * SHORT);
        sums[b] = steps[b] * (float)sum_codes(codes + b * SHORT, SHORT);
    }
}

CLONES static void round_long(const float *x, int64_t columns, int8_t *codes, float *steps, int16_t *sum16,
                              int16_t *sum32) {
    for (int64_t b = 0; b < columns / LONG; b++) steps[b] = round_block(x + b * LONG, LONG, codes + b * LONG);
    for (int64_t i = 0; i < columns / 16; i++) sum16[i] = (int16_t)sum_codes(codes + i * 16, 16);
    for (int64_t i = 0; i < columns / 32; i++) sum32[i] = (int16_t)(sum16[2 * i] + sum16[2 * i + 1]);
}

EXPORT void kvswap_round_activation(int64_t type, const float *x, int64_t columns, void *rounded) {
    const int64_t kind = kvswap_activation_kind(type);
    const Vector to = kvswap_rounded_vector(kind, columns, rounded);
    if (kind == 0)
        memcpy(rounded, x, (size_t)columns * sizeof *x);
    else if (kind == 1)
        round_short(x, columns, (int8_t *)to.codes, (float *)to.steps, (float *)to.sums);
    else
        round_long(x, columns, (int8_t *)to.codes, (float *)to.steps, (int16_t *)to.sum16, (int16_t *)to.sum32);
}

int64_t kvswap_multiply_many(const kvswap_matrix *m, const void *rounded, int64_t rounded_bytes, int64_t count,
                             int64_t first, int64_t last, float *y, int64_t stride, int64_t kind) {
    const WeightProducts *products = kvswap_weight_products(kind);
    const int64_t activation = kvswap_activation_kind(m->type);
    Vector x[VECTORS];
    if (products == NULL || count > VECTORS) return 0;
    for (int64_t n = 0; n < count; n++)
        x[n] = kvswap_rounded_vector(activation, m->columns, (const char *)rounded + n * rounded_bytes);
    products->multiply(m, x, count, first, last, y, stride);
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
        kvswap_round_activation(m->type, x + n * m->columns, m->columns, (char *)scratch + n * bytes);
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
