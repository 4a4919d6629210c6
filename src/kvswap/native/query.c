/* From a layer's input to its predicted query: norm and RoPE, on either side of the model's own projection, and the
 * query in the directions of a sketch. One call each, since at one token a call costs more than what it computes.
 */
#include <math.h>

#include "common.h"

#define WIDEST 512 /* columns of a matrix that are worked on at a time */
#define LANES 16   /* partial sums, so that a compiler makes vectors of them */

/* Root-mean-square norm of [rows, elements], times weight + offset. */
CLONES EXPORT void kvswap_rms_norm(const float *hidden, const float *weight, int64_t rows, int64_t elements, float offset,
                                   float eps, float *out) {
    for (int64_t row = 0; row < rows; row++, hidden += elements, out += elements) {
        float sums[LANES] = {0}, sum = 0.0f;
        int64_t i = 0;
        for (; i + LANES <= elements; i += LANES)
            for (int k = 0; k < LANES; k++) sums[k] += hidden[i + k] * hidden[i + k];
        for (; i < elements; i++) sum += hidden[i] * hidden[i];
        for (int k = 0; k < LANES; k++) sum += sums[k];
        const float factor = 1.0f / sqrtf(sum / (float)elements + eps);
        for (i = 0; i < elements; i++) out[i] = hidden[i] * factor * (weight[i] + offset);
    }
}

/* RoPE of queries [batch, heads, 2 * half], the first half of a head's elements paired with the second. cos and sin are
 * [batch, 2 * half], `stride` elements from one sequence to the next: none where all have the same. */
CLONES EXPORT void kvswap_rotate(const float *query, const float *cosine, const float *sine, int64_t batch, int64_t heads,
                                 int64_t half, int64_t stride, float *out) {
    for (int64_t b = 0; b < batch; b++, cosine += stride, sine += stride)
        for (int64_t h = 0; h < heads; h++, query += 2 * half, out += 2 * half)
            for (int64_t i = 0; i < half; i++) {
                const float low = query[i], high = query[half + i];
                out[i] = low * cosine[i] - high * sine[i];
                out[half + i] = high * cosine[half + i] + low * sine[half + i];
            }
}

/* Queries [batch, kv_heads * each, elements] times the matrix of their KV head, float16 [kv_heads, elements, rank],
 * and `scaling`: [batch, kv_heads * each, rank]. */
CLONES EXPORT void kvswap_project(const float *query, const uint16_t *matrix, int64_t batch, int64_t kv_heads,
                                  int64_t each, int64_t elements, int64_t rank, float scaling, float *out) {
    const int64_t heads = kv_heads * each;
    float row[WIDEST];
    memset(out, 0, (size_t)(batch * heads * rank) * sizeof *out);
    for (int64_t first = 0; first < rank; first += WIDEST) {
        const int64_t count = rank - first < WIDEST ? rank - first : WIDEST;
        for (int64_t i = 0; i < kv_heads * elements; i++) {
            for (int64_t r = 0; r < count; r++) row[r] = half_to_float(matrix[i * rank + first + r]);
            for (int64_t n = 0; n < batch * each; n++) {
                const int64_t place = n / each * heads + i / elements * each + n % each;
                const float factor = query[place * elements + i % elements] * scaling;
                float *to = out + place * rank + first;
                for (int64_t r = 0; r < count; r++) to[r] += factor * row[r];
            }
        }
    }
}
