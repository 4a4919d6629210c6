/* STUB until the merge: float32 and bfloat16 alone. */
#include "weights.h"
EXPORT int64_t kvswap_activation_kind(int64_t type) { return type == F32 || type == BF16 ? 0 : -1; }
EXPORT int64_t kvswap_activation_bytes(int64_t type, int64_t columns) { (void)type; return (columns * 4 + 63) / 64 * 64; }
EXPORT void kvswap_round_activation(int64_t type, const float *x, int64_t columns, void *rounded) {
    (void)type; memcpy(rounded, x, (size_t)columns * 4);
}
CLONES static float dot(const void *row, int64_t type, const float *x, int64_t n) {
    float sums[32] = {0}, sum = 0;
    int64_t i = 0;
    if (type == F32) { const float *w = row;
        for (; i + 32 <= n; i += 32) for (int k = 0; k < 32; k++) sums[k] += w[i + k] * x[i + k];
        for (; i < n; i++) sum += w[i] * x[i];
    } else { const uint16_t *w = row;
        for (; i + 32 <= n; i += 32) for (int k = 0; k < 32; k++) { uint32_t b = (uint32_t)w[i+k] << 16; float f; memcpy(&f,&b,4); sums[k] += f * x[i + k]; }
        for (; i < n; i++) { uint32_t b = (uint32_t)w[i] << 16; float f; memcpy(&f,&b,4); sum += f * x[i]; }
    }
    for (int k = 0; k < 32; k++) sum += sums[k];
    return sum;
}
EXPORT void kvswap_multiply_rows(const kvswap_matrix *m, const void *rounded, int64_t first, int64_t last, float *y) {
    for (int64_t r = first; r < last; r++) y[r] = dot(m->data + r * m->row_bytes, m->type, rounded, m->columns);
}
int64_t kvswap_multiply_many(const kvswap_matrix *m, const void *rounded, int64_t rounded_bytes, int64_t count,
                             int64_t first, int64_t last, float *y, int64_t stride, int64_t kind) {
    (void)kind;
    for (int64_t n = 0; n < count; n++)
        kvswap_multiply_rows(m, (const uint8_t *)rounded + n * rounded_bytes, first, last, y + n * stride);
    return 1;
}
