/* The three calls of a decode step in a layer: its predicted query, its K and V, and its output.
 *
 * Norms, RoPE and sums are little beside the matrices, so the calling thread does them. Rows of matrices and groups of
 * tokens are shared out to workers, one parallel region a phase.
 */
#include "step.h"
#include "workers.h"

#define ROWS 32   /* of a matrix that are one item of work */
#define PHASE 3   /* matrices at most that multiply the same vectors at once */
#define KINDS 3   /* ways to round a vector */
#define GRAIN (1 << 15) /* products from which work is shared out: about ten microseconds */

/* Memory of a step, in this order; vectors are those of all sequences, one after the other. */
typedef struct {
    float *state;    /* [E] residual stream */
    float *input;    /* [E] what matrices multiply */
    float *out;      /* [E] what they give */
    float *query, *keys, *values, *attended;
    float *gate, *up; /* [inner] */
    uint8_t *rounded[KINDS]; /* the widest vector, as each kind of matrix takes it */
    int64_t rounded_bytes;
    uint8_t *attention;
} Memory;

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t widest_bytes(const Layer *layer) {
    const Linear *all[] = {&layer->q, &layer->k, &layer->v, &layer->o, &layer->gate, &layer->up, &layer->down};
    int64_t widest = 0;
    for (int n = 0; n < 7; n++) {
        const kvswap_matrix *m = &all[n]->matrix;
        widest = larger(widest, kvswap_activation_bytes(m->type, m->columns));
    }
    return whole_lines(widest);
}

/* Where everything is from `base` on; returns the bytes of all. */
static int64_t divide(const Layer *layer, int64_t batch, int64_t workers, uint8_t *base, Memory *memory) {
    const int64_t queries = layer->heads * layer->head_dim, keys = layer->kv_heads * layer->head_dim;
    const int64_t sizes[] = {layer->hidden, layer->hidden, layer->hidden, queries, keys, keys, queries, layer->inner,
                             layer->inner};
    float **places[] = {&memory->state, &memory->input, &memory->out, &memory->query, &memory->keys, &memory->values,
                        &memory->attended, &memory->gate, &memory->up};
    int64_t bytes = 0;
    for (int n = 0; n < 9; n++) {
        *places[n] = (float *)(base + bytes);
        bytes += whole_lines(batch * sizes[n] * 4);
    }
    memory->rounded_bytes = widest_bytes(layer);
    for (int kind = 0; kind < KINDS; kind++) {
        memory->rounded[kind] = base + bytes;
        bytes += batch * memory->rounded_bytes;
    }
    memory->attention = base + bytes;
    return bytes + kvswap_attend_bytes(layer, batch, workers);
}

/* Bytes of scratch for `batch` sequences; 0 for a layer that has no sense. */
EXPORT int64_t kvswap_step_bytes(const Layer *layer, int64_t batch, int64_t workers) {
    static uint8_t nowhere;
    Memory memory;
    if (layer->kv_heads < 1 || layer->heads % layer->kv_heads || layer->head_dim < 2 || layer->head_dim % 2) return 0;
    return batch < 1 || workers < 1 ? 0 : divide(layer, batch, workers, &nowhere, &memory);
}

/* Products of the same vectors with up to PHASE matrices. */
typedef struct {
    const Linear *linear[PHASE];
    const uint8_t *rounded[PHASE];
    float *out[PHASE];
    int64_t ends[PHASE]; /* of each matrix's items */
    int64_t count, batch, rounded_bytes, activation;
} Phase;

/* Some rows of one matrix, for all sequences. */
INLINE void multiply(const Phase *all, int64_t n, int64_t first, int64_t last) {
    const Linear *linear = all->linear[n];
    const int64_t rows = linear->matrix.rows;
    for (int64_t b = 0; b < all->batch; b += VECTORS) {
        const int64_t count = all->batch - b < VECTORS ? all->batch - b : VECTORS;
        kvswap_multiply_many(&linear->matrix, all->rounded[n] + b * all->rounded_bytes, all->rounded_bytes, count, first,
                             last, all->out[n] + b * rows, rows, 0);
    }
    if (linear->bias == NULL) return;
    for (int64_t b = 0; b < all->batch; b++)
        for (int64_t r = first; r < last; r++) all->out[n][b * rows + r] += linear->bias[r];
}

static void multiply_item(const void *task, int64_t item, int64_t worker) {
    const Phase *all = task;
    int64_t n = 0;
    (void)worker;
    while (item >= all->ends[n]) n++;
    const int64_t first = (item - (n ? all->ends[n - 1] : 0)) * ROWS, rows = all->linear[n]->matrix.rows;
    multiply(all, n, first, first + ROWS < rows ? first + ROWS : rows);
}

/* gate = activation(gate) * up, of some elements. GELU by its approximation with tanh: x * sigmoid(2 u). */
CLONES static void activate(float *gate, const float *up, int64_t count, int64_t activation) {
    if (activation == SILU)
        for (int64_t i = 0; i < count; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    else
        for (int64_t i = 0; i < count; i++) {
            const float u = 0.7978845608f * (gate[i] + 0.044715f * gate[i] * gate[i] * gate[i]);
            gate[i] = gate[i] / (1.0f + exponential(-2.0f * u)) * up[i];
        }
}

/* The same rows of gate and up, and what becomes of them. */
static void gate_item(const void *task, int64_t item, int64_t worker) {
    const Phase *all = task;
    const int64_t rows = all->linear[0]->matrix.rows, first = item * ROWS, last = first + ROWS < rows ? first + ROWS : rows;
    (void)worker;
    for (int n = 0; n < 2; n++) multiply(all, n, first, last);
    for (int64_t b = 0; b < all->batch; b++)
        activate(all->out[0] + b * rows + first, all->out[1] + b * rows + first, last - first, all->activation);
}

/* The products of `input` [batch, columns] with some matrices: round it once for each kind, then share out the rows. */
static void run_phase(const Linear *const *linear, float *const *out, int64_t count, const float *input, const Memory *memory,
                      const Step *step, Work *work, int64_t activation) {
    Phase all = {.count = count, .batch = step->batch, .rounded_bytes = memory->rounded_bytes, .activation = activation};
    int64_t done = 0, products = 0, fine = 0;
    for (int64_t n = 0; n < count; n++) fine |= linear[n]->matrix.fine;
    for (int64_t n = 0; n < count; n++) {
        const kvswap_matrix *m = &linear[n]->matrix;
        const int64_t kind = kvswap_activation_kind(m->type);
        uint8_t *to = memory->rounded[kind];
        if (!(done >> kind & 1))
            for (int64_t b = 0; b < step->batch; b++)
                kvswap_round_activation(m->type, fine, input + b * m->columns, m->columns, to + b * memory->rounded_bytes);
        done |= (int64_t)1 << kind;
        products += m->rows * m->columns * step->batch;
        all.linear[n] = linear[n];
        all.rounded[n] = to;
        all.out[n] = out[n];
        all.ends[n] = (n ? all.ends[n - 1] : 0) + (m->rows + ROWS - 1) / ROWS;
    }
    const int64_t items = work == gate_item ? all.ends[0] : all.ends[count - 1];
    kvswap_do_all(work, &all, items, products < GRAIN ? 1 : step->workers);
}

INLINE void multiply_one(const Linear *linear, const float *input, const Memory *memory, const Step *step, float *out) {
    const Linear *const matrices[] = {linear};
    float *const to[] = {out};
    run_phase(matrices, to, 1, input, memory, step, multiply_item, 0);
}

INLINE void normalise(const Norm *norm, const float *in, int64_t rows, int64_t elements, float *out) {
    if (norm->weight)
        kvswap_rms_norm(in, norm->weight, rows, elements, norm->offset, norm->eps, out);
    else if (in != out)
        memcpy(out, in, (size_t)(rows * elements) * sizeof *out);
}

/* Hidden states to floats and back. */
CLONES static void from_hidden(const void *hidden, int64_t type, int64_t count, float *out) {
    const uint16_t *halves = hidden;
    if (type == F32)
        memcpy(out, hidden, (size_t)count * sizeof *out);
    else
        for (int64_t i = 0; i < count; i++) {
            const uint32_t bits = (uint32_t)halves[i] << 16;
            memcpy(out + i, &bits, 4);
        }
}

CLONES static void to_hidden(const float *in, int64_t type, int64_t count, void *hidden) {
    uint16_t *halves = hidden;
    if (type == F32)
        memcpy(hidden, in, (size_t)count * sizeof *in);
    else
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, in + i, 4);
            halves[i] = (uint16_t)(in[i] != in[i] ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
        }
}

/* Norm by head, if there is one, and RoPE, of [batch, heads, d]; `spare` has as many elements. */
static void finish_heads(const Layer *layer, const Step *step, const Norm *norm, int64_t heads, float *in, float *spare) {
    const int64_t rows = step->batch * heads, d = layer->head_dim;
    normalise(norm, in, rows, d, spare);
    kvswap_rotate(spare, step->cosine, step->sine, step->batch, heads, d / 2, step->rope_stride, in);
}

/* Where everything is, and whether it fits. */
static int64_t open_step(const Layer *layer, const Step *step, Memory *memory) {
    if (kvswap_step_bytes(layer, step->batch, step->workers) == 0) return 0;
    return divide(layer, step->batch, step->workers, step->scratch, memory) <= step->scratch_bytes;
}

/* The query [batch, heads * head_dim] that this layer is predicted to have, from a hidden state [batch, E] of this layer or
 * the one before. Returns 0 where the scratch is too small; then nothing was done. */
EXPORT int64_t kvswap_step_query(const Layer *layer, const Step *step, const void *hidden, float *query) {
    Memory memory;
    if (!open_step(layer, step, &memory)) return 0;
    from_hidden(hidden, step->type, step->batch * layer->hidden, memory.state);
    normalise(&layer->input, memory.state, step->batch, layer->hidden, memory.input);
    multiply_one(&layer->q, memory.input, &memory, step, query);
    finish_heads(layer, step, &layer->q_norm, layer->heads, query, memory.attended);
    return 1;
}

/* The newest K, V to their places in slots; the same as kvswap_put_tokens, with floats as well. */
static int64_t put_newest(const Layer *layer, const Slots *slots, const int64_t *pinned, const int64_t *offset,
                          int64_t batch, const float *keys, const float *values) {
    const int64_t d = layer->head_dim, heads = layer->kv_heads, strides[] = {heads * d, d, heads * d, d};
    if (slots->type != F32)
        return kvswap_put_tokens((uint16_t *)slots->data, slots->count, slots->slot_bytes / 2, pinned, offset, batch, heads,
                                 slots->group_tokens, d, slots->type == BF16, keys, values, strides);
    for (int64_t b = 0; b < batch; b++)
        if (pinned[b] < 0 || pinned[b] >= slots->count || offset[b] < 0 || offset[b] >= slots->group_tokens) return 0;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t part = 0; part < 2; part++)
            for (int64_t h = 0; h < heads; h++) {
                const int64_t place = ((part * heads + h) * slots->group_tokens + offset[b]) * d;
                memcpy((float *)(slots->data + pinned[b] * slots->slot_bytes) + place,
                       (part ? values : keys) + (b * heads + h) * d, (size_t)d * sizeof *keys);
            }
    return 1;
}

/* Query, key and value of a layer from its input [batch, E]. The query stays in the scratch for kvswap_step_finish; the
 * newest K and V go to place `offset` of slot `pinned`, both [batch]. Returns 0 where the scratch is too small or a place
 * does not exist; then no slot was changed. */
EXPORT int64_t kvswap_step_begin(const Layer *layer, const Step *step, const void *hidden, const Slots *slots,
                                 const int64_t *pinned, const int64_t *offset) {
    Memory memory;
    if (!open_step(layer, step, &memory)) return 0;
    const Linear *const matrices[] = {&layer->q, &layer->k, &layer->v};
    float *const to[] = {memory.query, memory.keys, memory.values};
    from_hidden(hidden, step->type, step->batch * layer->hidden, memory.state);
    normalise(&layer->input, memory.state, step->batch, layer->hidden, memory.input);
    run_phase(matrices, to, 3, memory.input, &memory, step, multiply_item, 0);
    finish_heads(layer, step, &layer->q_norm, layer->heads, memory.query, memory.attended);
    finish_heads(layer, step, &layer->k_norm, layer->kv_heads, memory.keys, memory.attended);
    return put_newest(layer, slots, pinned, offset, step->batch, memory.keys, memory.values);
}

/* Add a branch's result, after its own norm if it has one, to the residual stream. */
INLINE void add_branch(const Layer *layer, const Step *step, const Norm *norm, Memory *memory) {
    const int64_t count = step->batch * layer->hidden;
    normalise(norm, memory->out, step->batch, layer->hidden, memory->input);
    for (int64_t i = 0; i < count; i++) memory->state[i] += memory->input[i];
}

/* Whether all numbers lie in [0, end). */
INLINE int64_t within(const int64_t *numbers, int64_t count, int64_t end) {
    for (int64_t i = 0; i < count; i++)
        if (numbers[i] < 0 || numbers[i] >= end) return 0;
    return 1;
}

/* A layer's output [batch, E], after kvswap_step_begin with the same scratch: attention over groups in slots, output
 * projection, MLP, and both residuals. `index` to `offset` are those of kvswap_attend. Returns 0 where the scratch is too
 * small or a slot does not exist; then nothing was done. */
EXPORT int64_t kvswap_step_finish(const Layer *layer, const Step *step, const Slots *slots, const int64_t *index,
                                  const uint8_t *valid, int64_t width, const int64_t *offset, void *hidden) {
    Memory memory;
    if (!open_step(layer, step, &memory) || width < 1 || slots->group_tokens < 1 || slots->group_tokens > LINE) return 0;
    if (!within(index, step->batch * width, slots->count) || !within(offset, step->batch, slots->group_tokens)) return 0;
    const Linear *const matrices[] = {&layer->gate, &layer->up};
    float *const to[] = {memory.gate, memory.up};
    kvswap_attend(layer, slots, memory.query, step->batch, index, valid, width, offset, step->workers, memory.attention,
                  memory.attended);
    multiply_one(&layer->o, memory.attended, &memory, step, memory.out);
    add_branch(layer, step, &layer->after_attention, &memory);
    normalise(&layer->before_mlp, memory.state, step->batch, layer->hidden, memory.input);
    run_phase(matrices, to, 2, memory.input, &memory, step, gate_item, layer->activation);
    multiply_one(&layer->down, memory.gate, &memory, step, memory.out);
    add_branch(layer, step, &layer->after_mlp, &memory);
    to_hidden(memory.state, step->type, step->batch * layer->hidden, hidden);
    return 1;
}
