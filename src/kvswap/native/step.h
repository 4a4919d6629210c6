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

/* What decode steps attended to, by the estimate that they chose groups by; see selection/tally.py.
 *
 * groups   [batch, columns] mean over heads of each group's share of attention, summed over choices
 * squares  the square of each group's share of what was picked, summed over choices
 * kept     the share of all attended groups together, summed over choices; `choices` how many there were
 */
typedef struct {
    float *groups, *squares;
    int64_t columns;
    double kept;
    int64_t choices;
} Tally;

/* What is the same for all layers of one step.
 *
 * cosine, sine  [batch, d] float32, `rope_stride` elements from one sequence to the next: 0 where all have the same
 * type          of hidden states, F32 or BF16
 * scratch       kvswap_step_bytes, from the start of a cache line on
 * tally         takes what is chosen, or NULL
 */
typedef struct {
    int64_t batch, workers, type, rope_stride;
    const float *cosine, *sine;
    uint8_t *scratch;
    int64_t scratch_bytes;
    Tally *tally;
} Step;

/* Packed codes of one layer's keys.
 *
 * codes       [batch, tiles, rows, TILE] bytes: `sequence_bytes` and `tile_bytes` from one to the next
 * few         rows of a tile that coarse scores use
 * projection  [kv_heads, d, rank] float16; scales [rank] what its columns are multiplied by
 * tokens      [batch] that are coded, at most `tiles` * TILE, whole groups
 * flat        tokens up to which all are scored in full; of longer sequences, those of `fine` tiles
 */
typedef struct {
    const uint8_t *codes;
    int64_t sequence_bytes, tile_bytes, tiles, rows, bits, few;
    const uint16_t *projection;
    const float *scales;
    const int64_t *tokens;
    int64_t flat, fine;
} Sketch;

/* Where groups are found in memory, and where those that are not are read to; see kvswap_find. */
typedef struct {
    const int32_t *table;
    int64_t rows, columns, first;
    const float *powers;
    int64_t longest;
    float *worth;
    int32_t *seen, *visits;
    int64_t gap, places, slot_bytes;
} Pool;

/* Slots that are the same for every layer of a step, counted from the first slot that is pinned for a layer and sequence:
 * those of sinks [batch, sink_count] and of the newest groups [batch, ring_count], and which of them hold a group. */
typedef struct {
    const int64_t *sinks, *ring;
    const uint8_t *sinks_real, *ring_real;
    int64_t sink_count, ring_count;
} Pinned;

/* See step.c. */
int64_t kvswap_step_query(const Layer *layer, const Step *step, const void *hidden, float *query);
int64_t kvswap_step_begin(const Layer *layer, const Step *step, const void *hidden, const Slots *slots,
                          const int64_t *pinned, const int64_t *offset);
int64_t kvswap_step_finish(const Layer *layer, const Step *step, const Slots *slots, const int64_t *index,
                           const uint8_t *valid, int64_t width, const int64_t *offset, void *hidden);

/* See choose.c. */
int64_t kvswap_choose_floats(const Layer *layer, const Step *step, const Sketch *sketch, int64_t group_tokens);
int64_t kvswap_step_fetch(const Layer *layer, const Step *step, const void *hidden, const Sketch *sketch,
                          int64_t group_tokens, int64_t first, const int64_t *ends, int64_t count, float *scratch,
                          int64_t floats, const Pool *pool, int64_t order, int64_t staging_slot, int64_t staging_address,
                          int64_t *out);

/* See attention.c. */
int64_t kvswap_attended(const Pinned *pinned, int64_t batch, const int64_t *first, const int64_t *chosen,
                        const uint8_t *chosen_real, int64_t count, int64_t *index, uint8_t *real);

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
