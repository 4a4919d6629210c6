/* Products and unpacking of every type, for one kind of processor. weights_dot.c includes this once for each, after it has
 * defined TARGET (attributes of functions), NAME (of functions), and by that name:
 *
 * dot         sums of four products of unsigned codes up to 63 with signed ones
 * dot_signed  the same of signed codes
 * dot_scaled  sums so far, and four products each times a factor: one for the first 16 codes, one for the rest
 * add         a * b + c, rounded once
 * nibbles     the low four bits of 16 bytes, then their high ones
 * spread      16 where a bit is set
 * half        a float16 as float; `halves` eight of them
 *
 * TOGETHER is 4 or 1: how many rows, or vectors, are worked on at a time.
 *
 * Eight sums run side by side in the order of columns, and are added up at the end of a row.
 */

#define UNROLL _Pragma("GCC unroll 8")

TARGET INLINE u8x32 NAME(load)(const void *from) {
    u8x32 found;
    memcpy(&found, from, sizeof found);
    return found;
}

TARGET INLINE float NAME(half_at)(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, 2);
    return NAME(half)(half);
}

TARGET INLINE f32x8 NAME(splat)(float value) {
    return (f32x8){value, value, value, value, value, value, value, value};
}

TARGET INLINE f32x8 NAME(eight_floats)(const float *from) {
    f32x8 found;
    memcpy(&found, from, sizeof found);
    return found;
}

/* Eight integers as floats. */
TARGET INLINE f32x8 NAME(eight)(const int16_t *from) {
    s16x8 found;
    memcpy(&found, from, sizeof found);
    return __builtin_convertvector(__builtin_convertvector(found, s32x8), f32x8);
}

TARGET INLINE float NAME(total)(f32x8 sums) {
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

/* A right or left shift of bytes, right as far as the bits of `mask` go. */
TARGET INLINE u8x32 NAME(bits)(u8x32 bytes, const int right, const int left, const int mask) {
    const uint8_t m = (uint8_t)mask;
    const u8x32 all = {m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m, m};
    return (u8x32)((u16x16)bytes >> right << left) & all;
}

/* One short block: unsigned codes (signed of Q8_0), what one is worth, and what is added to each. */
TARGET INLINE u8x32 NAME(short_block)(const uint8_t *block, const int type, float *step, float *offset) {
    const int middle = type == Q4_0 ? 8 : type == Q5_0 ? 16 : 0, head = type == Q4_1 || type == Q5_1 ? 4 : 2;
    uint32_t high;
    *step = NAME(half_at)(block);
    *offset = head == 4 ? NAME(half_at)(block + 2) : *step * (float)-middle;
    if (type == Q8_0) return NAME(load)(block + 2);
    if (type == Q4_0 || type == Q4_1) return NAME(nibbles)(block + head);
    memcpy(&high, block + head, 4);
    return NAME(nibbles)(block + head + 4) | NAME(spread)(high);
}

/* Products of short blocks: `rows` rows from `row` with `count` vectors, one of which is 1. */
TARGET INLINE void NAME(multiply_short)(const kvswap_matrix *m, int64_t row, const Vector *x, float *y, int64_t stride,
                                        const int type, const int rows, const int count) {
    f32x8 sums[4] = {NAME(splat)(0), NAME(splat)(0), NAME(splat)(0), NAME(splat)(0)};
    float rest[4] = {0, 0, 0, 0};
    const uint8_t *data[4];
    for (int r = 0; r < rows; r++) data[r] = row_at(m, row + r);
    for (int64_t b = 0; b < m->columns / SHORT; b++) {
        prefetch(data[0] + b * rows * SHORT_BYTES(type), rows * SHORT_BYTES(type));
        UNROLL for (int r = 0; r < rows; r++) {
            float step, offset;
            const u8x32 codes = NAME(short_block)(data[r] + b * SHORT_BYTES(type), type, &step, &offset);
            UNROLL for (int n = 0; n < count; n++) {
                const s8x32 rounded = (s8x32)NAME(load)(x[n].codes + b * SHORT);
                const s32x8 dot = type == Q8_0 ? NAME(dot_signed)((s8x32)codes, rounded) : NAME(dot)(codes, rounded);
                const int k = r + n;
                sums[k] = NAME(add)(NAME(splat)(step * x[n].steps[b]), __builtin_convertvector(dot, f32x8), sums[k]);
                if (type != Q8_0) rest[k] = __builtin_fmaf(offset, x[n].sums[b], rest[k]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int n = 0; n < count; n++) y[n * stride + r] = NAME(total)(sums[r + n]) + rest[r + n];
}

/* Part s of a long block: 32 unsigned codes. */
TARGET INLINE u8x32 NAME(long_codes)(const uint8_t *block, const int type, const int s) {
    if (type == Q6_K) {
        const u8x32 low = NAME(load)(block + s / 4 * 64 + s % 2 * 32), high = NAME(load)(block + 128 + s / 4 * 32);
        const int from = s % 4 * 2; /* where the two high bits lie */
        return NAME(bits)(low, s % 4 / 2 * 4, 0, 15) | NAME(bits)(high, from > 4 ? from - 4 : 0, from < 4 ? 4 - from : 0, 48);
    }
    const u8x32 low = NAME(bits)(NAME(load)(block + (type == Q4_K ? 16 : 48) + s / 2 * 32), s % 2 * 4, 0, 15);
    if (type == Q4_K) return low;
    return low | NAME(bits)(NAME(load)(block + 16), s > 4 ? s - 4 : 0, s < 4 ? 4 - s : 0, 16);
}

/* Factors of the parts of a long block: [16] of Q6_K, else [8] and then what is subtracted, [8]. */
TARGET INLINE void NAME(long_scales)(const uint8_t *block, const int type, int16_t *scales) {
    if (type == Q6_K) {
        for (int i = 0; i < 16; i++) scales[i] = (int8_t)block[192 + i];
        return;
    }
    uint32_t packed[3], bytes[4];
    memcpy(packed, block + 4, 12);
    bytes[0] = packed[0] & 0x3f3f3f3fu;
    bytes[1] = (packed[2] & 0x0f0f0f0fu) | ((packed[0] >> 2) & 0x30303030u);
    bytes[2] = packed[1] & 0x3f3f3f3fu;
    bytes[3] = ((packed[2] >> 4) & 0x0f0f0f0fu) | ((packed[1] >> 2) & 0x30303030u);
    const uint8_t *each = (const uint8_t *)bytes;
    for (int i = 0; i < 16; i++) scales[i] = each[i];
}

/* Products of long blocks, as multiply_short. */
TARGET INLINE void NAME(multiply_long)(const kvswap_matrix *m, int64_t row, const Vector *x, float *y, int64_t stride,
                                       const int type, const int rows, const int count) {
    f32x8 sums[4] = {NAME(splat)(0), NAME(splat)(0), NAME(splat)(0), NAME(splat)(0)};
    f32x8 rest[4] = {NAME(splat)(0), NAME(splat)(0), NAME(splat)(0), NAME(splat)(0)};
    const uint8_t *data[4];
    for (int r = 0; r < rows; r++) data[r] = row_at(m, row + r);
    for (int64_t b = 0; b < m->columns / LONG; b++)
        UNROLL for (int r = 0; r < rows; r++) {
            const uint8_t *block = data[r] + b * LONG_BYTES(type);
            int16_t scales[16];
            s32x8 dots[4];
            prefetch(block, LONG_BYTES(type));
            NAME(long_scales)(block, type, scales);
            UNROLL for (int n = 0; n < count; n++) dots[n] = (s32x8){0};
            UNROLL for (int s = 0; s < 8; s++) {
                const u8x32 codes = NAME(long_codes)(block, type, s);
                const int16_t low = scales[type == Q6_K ? 2 * s : s], high = scales[type == Q6_K ? 2 * s + 1 : s];
                UNROLL for (int n = 0; n < count; n++)
                    dots[n] = NAME(dot_scaled)(dots[n], codes, (s8x32)NAME(load)(x[n].codes + b * LONG + s * 32), low, high);
            }
            const float step = NAME(half_at)(block + (type == Q6_K ? 208 : 0));
            const f32x8 least = NAME(splat)(type == Q6_K ? -32.0f * step : -NAME(half_at)(block + 2));
            UNROLL for (int n = 0; n < count; n++) {
                const int k = r + n;
                const float *offsets = type == Q6_K ? x[n].sum16 + b * 16 : x[n].sums + b * 8;
                const f32x8 dot = __builtin_convertvector(dots[n], f32x8), first = NAME(eight)(scales + (type == Q6_K ? 0 : 8));
                sums[k] = NAME(add)(NAME(splat)(step * x[n].steps[b]), dot, sums[k]);
                rest[k] = NAME(add)(least * first, NAME(eight_floats)(offsets), rest[k]);
                if (type != Q6_K) continue;
                rest[k] = NAME(add)(least * NAME(eight)(scales + 8), NAME(eight_floats)(offsets + 8), rest[k]);
            }
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int n = 0; n < count; n++) y[n * stride + r] = NAME(total)(sums[r + n]) + NAME(total)(rest[r + n]);
}

/* Eight weights that are floats. */
TARGET INLINE f32x8 NAME(floats)(const uint8_t *from, const int type) {
    f32x8 found;
    if (type == F16) return NAME(halves)(from);
    if (type == BF16) {
        uint16_t short_ones[8];
        uint32_t bits[8];
        memcpy(short_ones, from, 16);
        for (int i = 0; i < 8; i++) bits[i] = (uint32_t)short_ones[i] << 16;
        memcpy(&found, bits, 32);
        return found;
    }
    memcpy(&found, from, 32);
    return found;
}

/* One weight of a row of floats, past its last eight. */
TARGET INLINE float NAME(float_at)(const uint8_t *from, const int type) {
    uint8_t padded[32] = {0};
    memcpy(padded, from, type == F32 ? 4 : 2);
    return NAME(floats)(padded, type)[0];
}

/* Products of floats, as multiply_short. */
TARGET INLINE void NAME(multiply_floats)(const kvswap_matrix *m, int64_t row, const Vector *x, float *y, int64_t stride,
                                         const int type, const int rows, const int count) {
    f32x8 sums[4] = {NAME(splat)(0), NAME(splat)(0), NAME(splat)(0), NAME(splat)(0)};
    float rest[4] = {0, 0, 0, 0};
    const uint8_t *data[4];
    for (int r = 0; r < rows; r++) data[r] = row_at(m, row + r);
    const int size = type == F32 ? 4 : 2;
    int64_t i = 0;
    for (; i + 8 <= m->columns; i += 8)
        UNROLL for (int r = 0; r < rows; r++) {
            const f32x8 weights = NAME(floats)(data[r] + i * size, type);
            UNROLL for (int n = 0; n < count; n++) {
                sums[r + n] = NAME(add)(weights, NAME(eight_floats)(x[n].floats + i), sums[r + n]);
            }
        }
    for (; i < m->columns; i++)
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < count; n++)
                rest[r + n] = __builtin_fmaf(NAME(float_at)(data[r] + i * size, type), x[n].floats[i],
                                             rest[r + n]);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int n = 0; n < count; n++) y[n * stride + r] = NAME(total)(sums[r + n]) + rest[r + n];
}

/* All rows of one type with all vectors: a few rows at a time with every vector, so that they are read from memory once. */
#define MULTIPLY(function, type, ROWS)                                                                                  \
    TARGET static void NAME(multiply_##type)(const kvswap_matrix *m, const Vector *x, int64_t count, int64_t first,     \
                                             int64_t last, float *y, int64_t stride) {                                  \
        for (int64_t tile = first; tile < last; tile += 16) {                                                           \
            const int64_t end = tile + 16 < last ? tile + 16 : last;                                                    \
            int64_t n = 0;                                                                                              \
            for (; TOGETHER > 1 && n + 4 <= count; n += 4)                                                                         \
                for (int64_t row = tile; row < end; row++)                                                              \
                    function(m, row, x + n, y + n * stride + row - first, stride, type, 1, TOGETHER);                                  \
            for (; TOGETHER > 1 && n + 2 <= count; n += 2)                                                              \
                for (int64_t row = tile; row < end; row++)                                                              \
                    function(m, row, x + n, y + n * stride + row - first, stride, type, 1, 2);                          \
            for (; n < count; n++) {                                                                                    \
                int64_t row = tile;                                                                                     \
                for (; row + ROWS <= end; row += ROWS)                                                                  \
                    function(m, row, x + n, y + n * stride + row - first, stride, type, ROWS, 1);                               \
                if (ROWS > 1)                                                                                           \
                    for (; row < end; row++) function(m, row, x + n, y + n * stride + row - first, stride, type, 1, 1);         \
            }                                                                                                           \
        }                                                                                                               \
    }

MULTIPLY(NAME(multiply_floats), F32, TOGETHER)
MULTIPLY(NAME(multiply_floats), F16, TOGETHER)
MULTIPLY(NAME(multiply_floats), BF16, TOGETHER)
MULTIPLY(NAME(multiply_short), Q4_0, TOGETHER)
MULTIPLY(NAME(multiply_short), Q4_1, TOGETHER)
MULTIPLY(NAME(multiply_short), Q5_0, TOGETHER)
MULTIPLY(NAME(multiply_short), Q5_1, TOGETHER)
MULTIPLY(NAME(multiply_short), Q8_0, TOGETHER)
MULTIPLY(NAME(multiply_long), Q4_K, 1)
MULTIPLY(NAME(multiply_long), Q5_K, 1)
MULTIPLY(NAME(multiply_long), Q6_K, 1)

TARGET static void NAME(multiply)(const kvswap_matrix *m, const Vector *x, int64_t count, int64_t first, int64_t last,
                                  float *y, int64_t stride) {
    switch (m->type) {
    case F32: NAME(multiply_F32)(m, x, count, first, last, y, stride); break;
    case F16: NAME(multiply_F16)(m, x, count, first, last, y, stride); break;
    case BF16: NAME(multiply_BF16)(m, x, count, first, last, y, stride); break;
    case Q4_0: NAME(multiply_Q4_0)(m, x, count, first, last, y, stride); break;
    case Q4_1: NAME(multiply_Q4_1)(m, x, count, first, last, y, stride); break;
    case Q5_0: NAME(multiply_Q5_0)(m, x, count, first, last, y, stride); break;
    case Q5_1: NAME(multiply_Q5_1)(m, x, count, first, last, y, stride); break;
    case Q8_0: NAME(multiply_Q8_0)(m, x, count, first, last, y, stride); break;
    case Q4_K: NAME(multiply_Q4_K)(m, x, count, first, last, y, stride); break;
    case Q5_K: NAME(multiply_Q5_K)(m, x, count, first, last, y, stride); break;
    case Q6_K: NAME(multiply_Q6_K)(m, x, count, first, last, y, stride); break;
    default: break;
    }
}

#undef MULTIPLY

TARGET INLINE void NAME(unpack_short)(const uint8_t *row, int64_t columns, const int type, float *out) {
    const int middle = type == Q4_0 ? 8 : type == Q5_0 ? 16 : 0;
    for (int64_t b = 0; b < columns / SHORT; b++, row += SHORT_BYTES(type), out += SHORT) {
        float step, offset;
        uint8_t codes[SHORT];
        const u8x32 found = NAME(short_block)(row, type, &step, &offset);
        memcpy(codes, &found, SHORT);
        for (int i = 0; i < SHORT; i++) {
            const float value = step * (float)(type == Q8_0 ? (int8_t)codes[i] : codes[i] - middle);
            out[i] = type == Q4_1 || type == Q5_1 ? value + offset : value;
        }
    }
}

TARGET INLINE void NAME(unpack_long)(const uint8_t *row, int64_t columns, const int type, float *out) {
    for (int64_t b = 0; b < columns / LONG; b++, row += LONG_BYTES(type)) {
        const float step = NAME(half_at)(row + (type == Q6_K ? 208 : 0));
        const float least = type == Q6_K ? 0.0f : NAME(half_at)(row + 2);
        int16_t scales[16];
        NAME(long_scales)(row, type, scales);
        UNROLL for (int s = 0; s < 8; s++, out += 32) {
            const u8x32 found = NAME(long_codes)(row, type, s);
            uint8_t codes[32];
            memcpy(codes, &found, 32);
            const float low = step * (float)scales[type == Q6_K ? 2 * s : s], offset = least * (float)scales[8 + s];
            const float high = type == Q6_K ? step * (float)scales[2 * s + 1] : low;
            for (int i = 0; i < 32; i++) {
                const float value = (i < 16 ? low : high) * (float)(type == Q6_K ? codes[i] - 32 : codes[i]);
                out[i] = type == Q6_K ? value : value - offset;
            }
        }
    }
}

TARGET INLINE void NAME(unpack_floats)(const uint8_t *row, int64_t columns, const int type, float *out) {
    const int size = type == F32 ? 4 : 2;
    int64_t i = 0;
    for (; i + 8 <= columns; i += 8) {
        const f32x8 found = NAME(floats)(row + i * size, type);
        memcpy(out + i, &found, 32);
    }
    for (; i < columns; i++) out[i] = NAME(float_at)(row + i * size, type);
}

TARGET static void NAME(unpack)(const kvswap_matrix *m, int64_t first, int64_t last, float *out) {
    for (int64_t r = first; r < last; r++, out += m->columns) {
        const uint8_t *row = row_at(m, r);
        switch (m->type) {
        case F32: NAME(unpack_floats)(row, m->columns, F32, out); break;
        case F16: NAME(unpack_floats)(row, m->columns, F16, out); break;
        case BF16: NAME(unpack_floats)(row, m->columns, BF16, out); break;
        case Q4_0: NAME(unpack_short)(row, m->columns, Q4_0, out); break;
        case Q4_1: NAME(unpack_short)(row, m->columns, Q4_1, out); break;
        case Q5_0: NAME(unpack_short)(row, m->columns, Q5_0, out); break;
        case Q5_1: NAME(unpack_short)(row, m->columns, Q5_1, out); break;
        case Q8_0: NAME(unpack_short)(row, m->columns, Q8_0, out); break;
        case Q4_K: NAME(unpack_long)(row, m->columns, Q4_K, out); break;
        case Q5_K: NAME(unpack_long)(row, m->columns, Q5_K, out); break;
        case Q6_K: NAME(unpack_long)(row, m->columns, Q6_K, out); break;
        default: break;
        }
    }
}

#undef UNROLL
