/* One decode step of a decoder layer in a few calls, for B sequences that each have one new token.
 *
 * core/compiled_step.py fills the structs here once, and native/step_loops.py has the same in Python. Everything is
 * float32 except weights, stored K and V, and the hidden states that go in and out. No function keeps a pointer.
 */
#ifndef KVSWAP_STEP_H
#define KVSWAP_STEP_H

#include <math.h>

#include "weights.h"

/* A root-mean-square norm times weight + offset; without a weight there is none. */
typedef struct {
    const float *weight;
    float offset, eps;
} Norm;

/* A matrix and what is added to its products, or NULL. */
typedef struct {
    kvswap_matrix matrix;
    const float *bias;
} Linear;

enum { SILU = 0, GELU_TANH = 1 };

/* One decoder layer: E elements of a hidden state, H_q and H_kv heads of d elements, an MLP of `inner` elements. */
typedef struct {
    int64_t hidden, heads, kv_heads, head_dim, inner, activation;
    float scaling;
    Linear q, k, v, o, gate, up, down;
    Norm input, q_norm, k_norm, after_attention, before_mlp, after_mlp;
} Layer;

/* All slots: each a group, [2, kv_heads, group_tokens, head_dim] of F32, F16 or BF16, and padding. */
typedef struct {
    uint8_t *data;
    int64_t count, slot_bytes, type, group_tokens;
} Slots;

/* What is the same for all layers of one step.
 *
 * cosine, sine  [batch, d] float32, `rope_stride` elements from one sequence to the next: 0 where all have the same
 * type          of hidden states, F32 or BF16
 * scratch       kvswap_step_bytes, from the start of a cache line on
 */
typedef struct {
    int64_t batch, workers, type, rope_stride;
    const float *cosine, *sine;
    uint8_t *scratch;
    int64_t scratch_bytes;
} Step;

/* See step.c. */
int64_t kvswap_step_query(const Layer *layer, const Step *step, const void *hidden, float *query);

/* Bytes of attention's scratch. */
int64_t kvswap_attend_bytes(const Layer *layer, int64_t batch, int64_t workers);

/* Attention of one token of each sequence over groups in slots, [batch, heads * head_dim].
 *
 * query   [batch, heads * head_dim]
 * index   [batch, width] slots in order of position, of which those count that `valid` [batch, width] names; NULL: all
 * offset  [batch]: the newest token's place in the last group that counts
 */
void kvswap_attend(const Layer *layer, const Slots *slots, const float *query, int64_t batch, const int64_t *index,
                   const uint8_t *valid, int64_t width, const int64_t *offset, int64_t workers, uint8_t *scratch,
                   float *out);

/* Of query.c and slots.c. */
void kvswap_rms_norm(const float *hidden, const float *weight, int64_t rows, int64_t elements, float offset, float eps,
                     float *out);
void kvswap_rotate(const float *query, const float *cosine, const float *sine, int64_t batch, int64_t heads,
                   int64_t half, int64_t stride, float *out);
int64_t kvswap_put_tokens(uint16_t *slots, int64_t count, int64_t slot_elements, const int64_t *pinned,
                          const int64_t *offsets, int64_t batch, int64_t heads, int64_t group_tokens, int64_t head_dim,
                          int64_t bfloat16, const float *keys, const float *values, const int64_t *strides);

#define LINE 64

INLINE int64_t whole_lines(int64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

#endif
