/* Products of rounded queries with one tile of packed codes: by bytes where the processor multiplies them four at a
 * time (VNNI) or two at a time (AVX2), else by 16-bit words. All three give the same integers.
 */
#include "processor.h"
#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 12)
#define BY_BYTES
#include <immintrin.h>
#endif

/* Products of `heads` (known when compiled) queries with one unpacked tile, times each head's step. */
INLINE void multiply(const int8_t *query, const float *steps, int64_t rank, const int16_t *codes, const int heads,
                     float *out) {
    int32_t sums[HEADS][TILE];
    memset(sums, 0, sizeof sums);
    for (int64_t first = 0; first < rank; first += RUN) {
        const int64_t stop = first + RUN < rank ? first + RUN : rank;
        int16_t part[HEADS][TILE];
        memset(part, 0, sizeof part);
        for (int64_t r = first; r < stop; r++)
            for (int h = 0; h < heads; h++) {
                const int16_t q = query[h * rank + r];
                for (int t = 0; t < TILE; t++) part[h][t] = (int16_t)(part[h][t] + q * codes[r * TILE + t]);
            }
        for (int h = 0; h < heads; h++)
            for (int t = 0; t < TILE; t++) sums[h][t] += part[h][t];
    }
    for (int h = 0; h < heads; h++)
        for (int t = 0; t < TILE; t++) out[h * TILE + t] = (float)sums[h][t] * steps[h];
}

CLONES static void by_words(const uint8_t *tile, int64_t rows, int64_t bits, const Queries *queries, void *scratch,
                            float *logits) {
    const int64_t stride = queries->stride, rank = queries->rank;
    int16_t *unpacked = scratch;
    if (stride != rows) memset(unpacked, 0, (size_t)rank * TILE * sizeof *unpacked);
    if (bits == 2)
        unpack(tile, rows, stride, 2, unpacked);
    else
        unpack(tile, rows, stride, 4, unpacked);
    for (int64_t h = 0; h < queries->heads; h += HEADS) {
        const int8_t *rounded = queries->rounded + h * rank;
        const float *steps = queries->steps + h;
        BY_COUNT(queries->heads - h, multiply(rounded, steps, rank, unpacked, N, logits + h * TILE))
    }
}

#ifdef BY_BYTES

#define VNNI __attribute__((target("arch=x86-64-v4,avx512vnni")))
#define AVX2 __attribute__((target("arch=x86-64-v3")))

/* Codes to vectors of `WIDTH` bits, by the instructions of `TARGET`; the two widths differ in the names alone.
 *
 * interleave  four rows of bytes, the bits `shift` and up of each, to four vectors of four bytes a token: vector j has
 *             tokens 16 * lane + 4 * j + (0 to 3) in each of its lanes of 128 bits
 * unpack      one row of vectors after the other, row k * stride + r from the k-th bits of byte row r; rows that there
 *             are not are zero
 */
#define UNPACKING(TARGET, WIDTH)                                                                                       \
    TARGET INLINE void interleave_##WIDTH(const __m##WIDTH##i *rows, const int shift, __m##WIDTH##i mask,              \
                                          __m##WIDTH##i *out) {                                                        \
        __m##WIDTH##i part[4], low[2], high[2];                                                                        \
        for (int i = 0; i < 4; i++)                                                                                    \
            part[i] = _mm##WIDTH##_and_si##WIDTH(_mm##WIDTH##_srli_epi16(rows[i], shift), mask);                       \
        for (int i = 0; i < 2; i++) {                                                                                  \
            low[i] = _mm##WIDTH##_unpacklo_epi8(part[2 * i], part[2 * i + 1]);                                         \
            high[i] = _mm##WIDTH##_unpackhi_epi8(part[2 * i], part[2 * i + 1]);                                        \
        }                                                                                                              \
        out[0] = _mm##WIDTH##_unpacklo_epi16(low[0], low[1]);                                                          \
        out[1] = _mm##WIDTH##_unpackhi_epi16(low[0], low[1]);                                                          \
        out[2] = _mm##WIDTH##_unpacklo_epi16(high[0], high[1]);                                                        \
        out[3] = _mm##WIDTH##_unpackhi_epi16(high[0], high[1]);                                                        \
    }                                                                                                                  \
    TARGET INLINE void unpack_##WIDTH(const uint8_t *codes, int64_t rows, int64_t stride, const int bits,              \
                                      __m##WIDTH##i *out) {                                                            \
        const __m##WIDTH##i mask = _mm##WIDTH##_set1_epi8((char)((1 << bits) - 1));                                    \
        for (int64_t r = 0; r < rows; r += 4) {                                                                        \
            __m##WIDTH##i four[4];                                                                                     \
            for (int i = 0; i < 4; i++)                                                                                \
                four[i] = r + i < rows ? _mm##WIDTH##_loadu_si##WIDTH((const void *)(codes + (r + i) * TILE))          \
                                       : _mm##WIDTH##_setzero_si##WIDTH();                                             \
            for (int k = 0; k < 8 / bits; k++) interleave_##WIDTH(four, k * bits, mask, out + k * stride + r);         \
        }                                                                                                              \
    }

UNPACKING(VNNI, 512)
UNPACKING(AVX2, 256)

VNNI INLINE void multiply_512(const int8_t *query, const int32_t *starts, const float *steps, int64_t rank,
                              const __m512i *codes, const int heads, float *out) {
    __m512i sums[HEADS][4];
    for (int h = 0; h < heads; h++)
        for (int j = 0; j < 4; j++) sums[h][j] = _mm512_set1_epi32(starts[h]);
    for (int64_t r = 0; r < rank; r += 4)
        for (int h = 0; h < heads; h++) {
            int32_t four;
            memcpy(&four, query + h * rank + r, 4);
            const __m512i q = _mm512_set1_epi32(four);
            for (int j = 0; j < 4; j++) sums[h][j] = _mm512_dpbusd_epi32(sums[h][j], codes[r + j], q);
        }
    for (int h = 0; h < heads; h++)
        for (int j = 0; j < 4; j++) {
            const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[h][j]), _mm512_set1_ps(steps[h]));
            float *to = out + h * TILE + 4 * j;
            _mm_storeu_ps(to, _mm512_extractf32x4_ps(scaled, 0));
            _mm_storeu_ps(to + 16, _mm512_extractf32x4_ps(scaled, 1));
            _mm_storeu_ps(to + 32, _mm512_extractf32x4_ps(scaled, 2));
            _mm_storeu_ps(to + 48, _mm512_extractf32x4_ps(scaled, 3));
        }
}

VNNI static void by_four_bytes(const uint8_t *tile, int64_t rows, int64_t bits, const Queries *queries, void *scratch,
                               float *logits) {
    const int64_t rank = queries->rank;
    __m512i *codes = scratch;
    if (bits == 2)
        unpack_512(tile, rows, queries->stride, 2, codes);
    else
        unpack_512(tile, rows, queries->stride, 4, codes);
    for (int64_t h = 0; h < queries->heads; h += HEADS) {
        const int8_t *rounded = queries->rounded + h * rank;
        const int32_t *starts = queries->starts + h;
        const float *steps = queries->steps + h;
        BY_COUNT(queries->heads - h, multiply_512(rounded, starts, steps, rank, codes, N, logits + h * TILE))
    }
}

#define PAIRS 2 /* heads at once: there are half as many registers */
#define QUADS 8 /* 2 * 15 * LEVELS * QUADS < 2^15 */

AVX2 INLINE void multiply_256(const int8_t *query, const int32_t *starts, const float *steps, int64_t rank,
                              const __m256i *codes, const int heads, float *out) {
    __m256i sums[PAIRS][4];
    for (int h = 0; h < heads; h++)
        for (int j = 0; j < 4; j++) sums[h][j] = _mm256_set1_epi32(starts[h]);
    for (int64_t first = 0; first < rank; first += 4 * QUADS) {
        const int64_t stop = first + 4 * QUADS < rank ? first + 4 * QUADS : rank;
        __m256i part[PAIRS][4];
        memset(part, 0, sizeof part);
        for (int64_t r = first; r < stop; r += 4)
            for (int h = 0; h < heads; h++) {
                int32_t four;
                memcpy(&four, query + h * rank + r, 4);
                const __m256i q = _mm256_set1_epi32(four);
                for (int j = 0; j < 4; j++)
                    part[h][j] = _mm256_add_epi16(part[h][j], _mm256_maddubs_epi16(codes[r + j], q));
            }
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < 4; j++)
                sums[h][j] = _mm256_add_epi32(sums[h][j], _mm256_madd_epi16(part[h][j], _mm256_set1_epi16(1)));
    }
    for (int h = 0; h < heads; h++)
        for (int j = 0; j < 4; j++) {
            const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[h][j]), _mm256_set1_ps(steps[h]));
            float *to = out + h * TILE + 4 * j;
            _mm_storeu_ps(to, _mm256_castps256_ps128(scaled));
            _mm_storeu_ps(to + 16, _mm256_extractf128_ps(scaled, 1));
        }
}

AVX2 static void by_two_bytes(const uint8_t *tile, int64_t rows, int64_t bits, const Queries *queries, void *scratch,
                              float *logits) {
    const int64_t rank = queries->rank;
    __m256i *codes = scratch;
    for (int half = 0; half < 2; half++) {
        if (bits == 2)
            unpack_256(tile + half * 32, rows, queries->stride, 2, codes);
        else
            unpack_256(tile + half * 32, rows, queries->stride, 4, codes);
        for (int64_t h = 0; h < queries->heads; h += PAIRS) {
            const int8_t *rounded = queries->rounded + h * rank;
            const int32_t *starts = queries->starts + h;
            const float *steps = queries->steps + h;
            float *to = logits + h * TILE + half * 32;
            if (queries->heads - h > 1)
                multiply_256(rounded, starts, steps, rank, codes, PAIRS, to);
            else
                multiply_256(rounded, starts, steps, rank, codes, 1, to);
        }
    }
}

#endif

/* Which of the above: 0 the best that this processor has, else 1 by words, 2 by two bytes, 3 by four. NULL where
 * the processor has none of that kind. */
Products *kvswap_products(int64_t kind) {
#ifdef BY_BYTES
    const int two = kvswap_processor() & HAS_X86_V3, four = kvswap_processor() & HAS_AVX512_VNNI;
    if (four && (kind == 0 || kind == 3)) return by_four_bytes;
    if (two && (kind == 0 || kind == 2)) return by_two_bytes;
#endif
    return kind < 2 ? by_words : NULL;
}
