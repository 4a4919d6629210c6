/* Slots: looking groups up, planning reads, keeping what was read, and converting elements from and to 16 bits.
 *
 * Everything here has an equivalent in NumPy or torch; the tests compare the two.
 */
#include <math.h>

#include "convert.h"
#include "workers.h"

#define HALF_MAX 65504.0f

/* What is left of worth after `idle` visits; `powers` holds factors for 0 to `longest`, the last stands for more. */
INLINE float faded(float worth, int32_t idle, const float *powers, int64_t longest) {
    return worth * powers[idle < longest ? idle : longest];
}

/* One more selection of slot s at this visit of its layer. */
INLINE void use_slot(int64_t s, int64_t visit, const float *powers, int64_t longest, float *worth, int32_t *seen) {
    worth[s] = faded(worth[s], (int32_t)visit - seen[s], powers, longest) + 1.0f;
    seen[s] = (int32_t)visit;
}

/* Whether all of `count` numbers lie in [0, end): nothing is read or written elsewhere. */
INLINE int64_t all_within(const int64_t *numbers, int64_t count, int64_t end) {
    uint64_t largest = 0; /* a negative number is a very large one */
    for (int64_t i = 0; i < count; i++) largest = (uint64_t)numbers[i] > largest ? (uint64_t)numbers[i] : largest;
    return count == 0 || largest < (uint64_t)end;
}

/* The slot of each group, or -1: what the table [table_rows, columns] has. Slots that were found gain worth. Returns
 * whether all rows and groups are in the table; otherwise nothing was done.
 *
 * rows, groups  [count]
 * first         number of the slot that worth[0] and seen[0] belong to
 * visit         number of this visit of the layer
 */
EXPORT int64_t kvswap_lookup(const int32_t *table, int64_t table_rows, int64_t columns, const int64_t *rows,
                             const int64_t *groups, int64_t count, int64_t first, int64_t visit, const float *powers,
                             int64_t longest, float *worth, int32_t *seen, int64_t *found) {
    if (!all_within(rows, count, table_rows) || !all_within(groups, count, columns)) return 0;
    for (int64_t i = 0; i < count; i++) {
        const int32_t slot = table[rows[i] * columns + groups[i]];
        found[i] = slot;
        if (slot >= 0) use_slot(slot - first, visit, powers, longest, worth, seen);
    }
    return 1;
}

/* Extents of requested groups, sorted by (file, group). Neighbours are joined, and so are groups with at most `gap`
 * others between them, the narrowest gaps first, as long as at most `spare` groups are read that nobody requested.
 * Returns how many extents.
 *
 * joined         [count], working memory
 * out_files ...  [count] each, as many as there are extents: file, first group, groups, place in staging of the first
 * place          [count]: place in staging of each requested group
 */
EXPORT int64_t kvswap_plan_reads(const int64_t *files, const int64_t *groups, int64_t count, int64_t gap,
                                 int64_t spare, uint8_t *joined, int64_t *out_files, int64_t *out_first,
                                 int64_t *out_count, int64_t *out_place, int64_t *place) {
    int64_t between = 0, extents = 0, staging = 0;
    for (int64_t i = 1; i < count; i++) {
        const int64_t step = groups[i] - groups[i - 1];
        joined[i] = files[i] == files[i - 1] && step <= 1 + gap;
        between += joined[i] ? step - 1 : 0;
    }
    for (int64_t size = 0, taken = 0; between > spare && size <= gap; size++)
        for (int64_t i = 1; i < count; i++)
            if (joined[i] && groups[i] - groups[i - 1] == 1 + size) {
                taken += size;
                joined[i] = taken <= spare;
            }
    for (int64_t i = 0; i < count; i++) {
        if (i > 0 && joined[i]) {
            staging += groups[i] - groups[i - 1];
            out_count[extents - 1] += groups[i] - groups[i - 1];
        } else {
            staging += i > 0;
            out_files[extents] = files[i];
            out_first[extents] = groups[i];
            out_count[extents] = 1;
            out_place[extents++] = staging;
        }
        place[i] = staging;
    }
    return extents;
}

/* Where extents of groups are on disk, each split where it goes from a segment to the next or from a stripe to the next
 * (kvswap.store.segments). Returns how many pieces there are, or -1 for a row or group that is in no segment. More than
 * `room` pieces are counted and not written.
 *
 * starts, files  [segments, rows]: the first group of each row in a segment, and its file
 * stripes        [segments]: groups of a row in a stripe, 0 where each row has a file of its own
 * row ...        [count] each: row, first group, groups and memory address of an extent
 * out            four rows of `room`: file, offset and length in bytes, and memory address of each piece
 */
EXPORT int64_t kvswap_locate(const int64_t *starts, const int64_t *files, const int64_t *stripes, int64_t segments,
                             int64_t rows, const int64_t *row, const int64_t *first, const int64_t *groups,
                             const int64_t *address, int64_t count, int64_t slot_bytes, int64_t room, int64_t *out) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t r = row[i], end = first[i] + groups[i];
        if (r < 0 || r >= rows) return -1;
        for (int64_t group = first[i], stop; group < end; group = stop, pieces++) {
            int64_t s = segments - 1;
            for (stop = end; s >= 0 && starts[s * rows + r] > group; s--)
                if (starts[s * rows + r] < stop) stop = starts[s * rows + r];
            if (s < 0) return -1;
            int64_t place = group - starts[s * rows + r];
            if (stripes[s]) {
                const int64_t stripe = place / stripes[s], rest = place % stripes[s];
                if (stop - group > stripes[s] - rest) stop = group + stripes[s] - rest;
                place = (stripe * rows + r) * stripes[s] + rest;
            }
            if (pieces < room) {
                out[pieces] = files[s * rows + r];
                out[room + pieces] = place * slot_bytes;
                out[2 * room + pieces] = (stop - group) * slot_bytes;
                out[3 * room + pieces] = address[i] + (group - first[i]) * slot_bytes;
            }
        }
    }
    return pieces;
}

/* kvswap_lookup of one layer's groups and kvswap_plan_reads of those that were not found. Returns how many reads, or -1
 * where a group or row does not exist, or where staging has too few places; then nothing was done.
 *
 * first_row     the row of the layer's first sequence, in the table and among files
 * groups        [batch, count], ascending in each sequence; those from ends[b] on do not count
 * places        groups that staging has room for, from slot `staging_slot` on, which is at `staging_address`
 * out           ten rows of batch * count: the slot of every group, 0 of those that do not count; sequence, group and
 *               slot of those to be read; row, first group, groups and address of each read; two of working memory. Then how many groups
 *               there are, how many of them are to be read, and how many places of staging they take
 */
EXPORT int64_t kvswap_find(const int32_t *table, int64_t table_rows, int64_t columns, int64_t first_row,
                           const int64_t *groups, int64_t batch, int64_t count, const int64_t *ends, int64_t first,
                           int64_t visit, const float *powers, int64_t longest, float *worth, int32_t *seen, int64_t gap,
                           int64_t places, int64_t staging_slot, int64_t staging_address, int64_t slot_bytes,
                           int64_t *out) {
    const int64_t size = batch * count;
    int64_t *slots = out, *sequences = out + size, *absent = out + 2 * size, *staged = out + 3 * size;
    int64_t *rows = out + 4 * size, *addresses = out + 7 * size, *files = out + 8 * size, *totals = out + 10 * size;
    int64_t requested = 0, missing = 0;
    if (first_row < 0 || first_row + batch > table_rows || !all_within(ends, batch, columns + 1)) return -1;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t n = 0; n < count; n++) {
            const int64_t group = groups[b * count + n], real = group < ends[b];
            if (group < 0) return -1;
            requested += real;
            missing += real && table[(first_row + b) * columns + group] < 0;
        }
    if (missing > places) return -1;
    totals[0] = requested;
    totals[1] = missing;
    missing = 0;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t n = 0; n < count; n++) {
            const int64_t place = b * count + n, group = groups[place];
            const int64_t slot = group < ends[b] ? table[(first_row + b) * columns + group] : 0;
            slots[place] = slot;
            if (slot < 0) {
                sequences[missing] = b;
                absent[missing] = group;
                files[missing++] = first_row + b;
            } else if (group < ends[b]) {
                use_slot(slot - first, visit, powers, longest, worth, seen);
            }
        }
    const int64_t reads = kvswap_plan_reads(files, absent, missing, gap, places - missing, (uint8_t *)(out + 9 * size),
                                            rows, rows + size, rows + 2 * size, addresses, staged);
    totals[2] = reads ? addresses[reads - 1] + rows[2 * size + reads - 1] : 0;
    for (int64_t i = 0; i < reads; i++) addresses[i] = staging_address + addresses[i] * slot_bytes;
    for (int64_t i = 0; i < missing; i++) staged[i] += staging_slot;
    for (int64_t place = 0, next = 0; place < size; place++)
        if (slots[place] < 0) slots[place] = staged[next++];
    return reads;
}

/* Keep groups that have just been read in the slots of least worth below 1 among the next `looked` ones; of equals, the
 * first ones. Returns how many were kept, the first ones of those given, or -1 where a key or slot does not exist; then
 * nothing was done.
 *
 * table       [places] flat; owner [slots] has the place in it that each slot's group is found by, or -1
 * layer_keys  places of one layer; visits [layers] counts the visits of each
 * hand        the slot to begin looking at
 * keys        [room] places of the groups in the table; staged [room] the slots that they were read into
 * scratch     2 * looked floats
 * memory      all slots, `slot_bytes` each, those of `owner` from number `first` on, the staged ones before it
 */
EXPORT int64_t kvswap_admit(int32_t *table, int64_t places, int64_t layer_keys, int64_t *owner, float *worth, int32_t *seen,
                            const int32_t *visits, int64_t slots, int64_t hand, int64_t looked, const float *powers,
                            int64_t longest, int64_t layer, const int64_t *keys, const int64_t *staged, int64_t room,
                            float *scratch, uint8_t *memory, int64_t slot_bytes, int64_t first) {
    float *now = scratch, *best = scratch + looked, limit = -INFINITY;
    int64_t size = 0, equals = 0, kept = 0;
    if (!all_within(keys, room, places) || !all_within(staged, room, first)) return -1;
    for (int64_t i = 0; i < looked; i++) {
        const int64_t s = hand + i < slots ? hand + i : hand + i - slots;
        now[i] = owner[s] < 0 ? -1.0f : faded(worth[s], visits[owner[s] / layer_keys] - seen[s], powers, longest);
        best[size] = -now[i];
        size += now[i] < 1.0f;
    }
    if (size > room) {
        limit = threshold(best, size, room);
        for (int64_t i = 0; i < room; i++) equals += best[i] == limit;
    }
    for (int64_t i = 0; i < looked && kept < room; i++) {
        if (now[i] >= 1.0f || -now[i] < limit || (-now[i] == limit && equals-- <= 0)) continue;
        const int64_t s = hand + i < slots ? hand + i : hand + i - slots;
        if (owner[s] >= 0) table[owner[s]] = -1;
        owner[s] = keys[kept];
        worth[s] = 1.0f;
        seen[s] = visits[layer];
        table[keys[kept]] = (int32_t)(first + s);
        memcpy(memory + (first + s) * slot_bytes, memory + staged[kept] * slot_bytes, (size_t)slot_bytes);
        kept++;
    }
    return kept;
}

/* What gathering for B sequences shares out to threads. The letters are those of kvswap_gather. */
typedef struct {
    const uint16_t *slots;
    int64_t slot_elements;
    const int64_t *index;
    int64_t batch, count, heads, run;
    Convert *convert;
    float *out;
    int64_t parts; /* of each sequence's groups */
} Gathering;

/* One part of one sequence's groups. */
static void gather_part(const void *task, int64_t item, int64_t worker) {
    const Gathering *all = task;
    const int64_t run = all->run, b = item / all->parts, part_of = item % all->parts;
    const int64_t stop = all->count * (part_of + 1) / all->parts;
    (void)worker;
    for (int64_t n = all->count * part_of / all->parts; n < stop; n++) {
        const uint16_t *slot = all->slots + all->index[b * all->count + n] * all->slot_elements;
        for (int64_t part = 0; part < 2; part++)
            for (int64_t h = 0; h < all->heads; h++) {
                const uint16_t *from = slot + (part * all->heads + h) * run;
                float *to = all->out + (((part * all->batch + b) * all->heads + h) * all->count + n) * run;
                all->convert(from, run, to);
            }
    }
}

/* Groups in slots to K, V in order of tokens, as floats.
 *
 * slots  rows of `slot_elements` 16-bit elements, each a group [2, heads, run] and padding; run = group_tokens * head_dim
 * index  [batch, count] rows to take, in order
 * bfloat16  whether elements are bfloat16, else float16
 * out    [2, batch, heads, count * run]
 *
 * Returns whether all rows are below `rows`; otherwise nothing was done.
 */
EXPORT int64_t kvswap_gather(const uint16_t *slots, int64_t rows, int64_t slot_elements, const int64_t *index,
                             int64_t batch, int64_t count, int64_t heads, int64_t run, int64_t bfloat16,
                             int64_t workers, float *out) {
    if (!all_within(index, batch * count, rows)) return 0;
    const int64_t parts = batch < workers ? (workers + batch - 1) / batch : 1;
    const Gathering all = {slots, slot_elements, index, batch, count, heads, run,
                           bfloat16 ? kvswap_convert_bfloat16() : kvswap_convert_float16(), out, parts};
    kvswap_do_all(gather_part, &all, batch * parts, workers);
    return 1;
}

/* A float as float16, to nearest, ties to even; larger values become the largest. No branches. */
INLINE uint16_t float_to_half(float value) {
    const float lowest = 6.103515625e-05f; /* of the normal ones */
    uint32_t bits, half, magic = 126u << 23; /* 0.5, whose last bit is the smallest float16 */
    memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    float size = fabsf(value);
    size = size > HALF_MAX ? HALF_MAX : size;
    const float shifted = size + 0.5f;
    memcpy(&bits, &shifted, 4);
    const uint32_t small = bits - magic;
    memcpy(&bits, &size, 4);
    half = (bits + 0xfffu + (bits >> 13 & 1u) - (112u << 23)) >> 13;
    half = size < lowest ? small : half;
    half = isinf(value) ? 0x7c00u : value != value ? 0x7e00u : half;
    return (uint16_t)(half | sign);
}

INLINE uint16_t float_to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0u : rounded);
}

/* One token of each sequence into its group: the inverse of kvswap_gather. Returns whether all places exist; otherwise
 * nothing was done.
 *
 * slots            [count]
 * pinned, offsets  [batch]: the pinned slot, and the token's place in the group
 * strides          [4]: of keys by sequence and head, of values by sequence and head; elements of a head are contiguous
 */
CLONES EXPORT int64_t kvswap_put_tokens(uint16_t *slots, int64_t count, int64_t slot_elements, const int64_t *pinned,
                                        const int64_t *offsets, int64_t batch, int64_t heads, int64_t group_tokens,
                                        int64_t head_dim, int64_t bfloat16, const float *keys, const float *values,
                                        const int64_t *strides) {
    if (!all_within(pinned, batch, count) || !all_within(offsets, batch, group_tokens)) return 0;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t part = 0; part < 2; part++)
            for (int64_t h = 0; h < heads; h++) {
                const float *from = (part ? values : keys) + b * strides[2 * part] + h * strides[2 * part + 1];
                uint16_t *to = slots + pinned[b] * slot_elements;
                to += ((part * heads + h) * group_tokens + offsets[b]) * head_dim;
                if (bfloat16)
                    for (int64_t i = 0; i < head_dim; i++) to[i] = float_to_bfloat16(from[i]);
                else
                    for (int64_t i = 0; i < head_dim; i++) to[i] = float_to_half(from[i]);
            }
    return 1;
}
