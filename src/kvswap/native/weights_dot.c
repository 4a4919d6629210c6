/* Products of blocks for several kinds of processors: plain C, AVX2, AVX-VNNI, AVX-512 VNNI, and NEON with dot products.
 * What they have in common is in weights_blocks.h.
 */
#include "processor.h"
#include "weights_vectors.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* functions that take wide vectors are all inlined */
#endif

#define TARGET
#define TOGETHER 1
#define NAME(function) function##_plain

/* Sums of four products, codes of either sign. */
#define PLAIN_DOT(FUNCTION, CODES, CODE)                                                                               \
    INLINE s32x8 FUNCTION(CODES codes, s8x32 rounded) {                                                                \
        CODE a[32];                                                                                                    \
        int8_t b[32];                                                                                                  \
        int32_t sums[8] = {0};                                                                                         \
        s32x8 found;                                                                                                   \
        memcpy(a, &codes, 32);                                                                                         \
        memcpy(b, &rounded, 32);                                                                                       \
        for (int i = 0; i < 32; i++) sums[i / 4] += a[i] * b[i];                                                       \
        memcpy(&found, sums, 32);                                                                                      \
        return found;                                                                                                  \
    }

PLAIN_DOT(dot_plain, u8x32, uint8_t)
PLAIN_DOT(dot_signed_plain, s8x32, int8_t)

INLINE s32x8 dot_scaled_plain(s32x8 sums, u8x32 codes, s8x32 rounded, int16_t low, int16_t high) {
    return sums + dot_plain(codes, rounded) * (s32x8){low, low, low, low, high, high, high, high};
}

INLINE f32x8 add_plain(f32x8 a, f32x8 b, f32x8 c) {
    f32x8 found;
    for (int i = 0; i < 8; i++) found[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return found;
}

INLINE u8x32 nibbles_plain(const uint8_t *from) {
    uint8_t bytes[32];
    u8x32 found;
    for (int i = 0; i < 16; i++) {
        bytes[i] = from[i] & 15;
        bytes[16 + i] = from[i] >> 4;
    }
    memcpy(&found, bytes, 32);
    return found;
}

INLINE u8x32 spread_plain(uint32_t bits) {
    uint8_t bytes[32];
    u8x32 found;
    for (int i = 0; i < 32; i++) bytes[i] = (uint8_t)((bits >> i & 1) << 4);
    memcpy(&found, bytes, 32);
    return found;
}

INLINE float half_plain(uint16_t half) { return half_to_float(half); }

INLINE f32x8 halves_plain(const uint8_t *from) {
    uint16_t halves[8];
    f32x8 found;
    memcpy(halves, from, 16);
    for (int i = 0; i < 8; i++) found[i] = half_to_float(halves[i]);
    return found;
}

#include "weights_blocks.h"
#undef TARGET
#undef NAME
#undef TOGETHER
#define TOGETHER 4

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 12)
#define X86
#include <immintrin.h>

/* What AVX2 and its successors do alike. */
#define SHARED(SUFFIX)                                                                                                 \
    TARGET INLINE f32x8 add_##SUFFIX(f32x8 a, f32x8 b, f32x8 c) {                                                      \
        return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);                                                \
    }                                                                                                                  \
    TARGET INLINE u8x32 nibbles_##SUFFIX(const uint8_t *from) {                                                        \
        const __m128i both = _mm_loadu_si128((const void *)from);                                                      \
        const __m256i apart = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);                                         \
        return (u8x32)_mm256_and_si256(apart, _mm256_set1_epi8(15));                                                   \
    }                                                                                                                  \
    TARGET INLINE u8x32 spread_##SUFFIX(uint32_t bits) {                                                               \
        const __m256i place = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);        \
        const __m256i one = _mm256_set1_epi64x((long long)0x8040201008040201);                                         \
        const __m256i each = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), place), one);          \
        return (u8x32)_mm256_and_si256(_mm256_cmpeq_epi8(each, one), _mm256_set1_epi8(16));                            \
    }                                                                                                                  \
    TARGET INLINE float half_##SUFFIX(uint16_t half) { return _cvtsh_ss(half); }                                       \
    TARGET INLINE f32x8 halves_##SUFFIX(const uint8_t *from) {                                                         \
        return (f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const void *)from));                                            \
    }                                                                                                                  \
    TARGET INLINE __m256i factors_##SUFFIX(int16_t low, int16_t high) {                                                \
        return low == high ? _mm256_set1_epi16(low) : _mm256_set_m128i(_mm_set1_epi16(high), _mm_set1_epi16(low));     \
    }

#define TARGET __attribute__((target("arch=x86-64-v3")))
#define NAME(function) function##_avx2

SHARED(avx2)

TARGET INLINE s32x8 dot_avx2(u8x32 codes, s8x32 rounded) {
    return (s32x8)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, (__m256i)rounded), _mm256_set1_epi16(1));
}

TARGET INLINE s32x8 dot_signed_avx2(s8x32 codes, s8x32 rounded) {
    const __m256i turned = _mm256_sign_epi8((__m256i)rounded, (__m256i)codes);
    return dot_avx2((u8x32)_mm256_abs_epi8((__m256i)codes), (s8x32)turned);
}

TARGET INLINE s32x8 dot_scaled_avx2(s32x8 sums, u8x32 codes, s8x32 rounded, int16_t low, int16_t high) {
    const __m256i two = _mm256_maddubs_epi16((__m256i)codes, (__m256i)rounded);
    return sums + (s32x8)_mm256_madd_epi16(two, factors_avx2(low, high));
}

#include "weights_blocks.h"
#undef TARGET
#undef NAME

/* The processors that multiply and add four bytes at once; the two kinds differ in names alone. */
#define BY_FOUR(SUFFIX, FOUR, TWO)                                                                                     \
    SHARED(SUFFIX)                                                                                                     \
    TARGET INLINE s32x8 dot_##SUFFIX(u8x32 codes, s8x32 rounded) {                                                     \
        return (s32x8)FOUR(_mm256_setzero_si256(), (__m256i)codes, (__m256i)rounded);                                  \
    }                                                                                                                  \
    TARGET INLINE s32x8 dot_signed_##SUFFIX(s8x32 codes, s8x32 rounded) {                                              \
        const __m256i turned = _mm256_sign_epi8((__m256i)rounded, (__m256i)codes);                                     \
        return dot_##SUFFIX((u8x32)_mm256_abs_epi8((__m256i)codes), (s8x32)turned);                                    \
    }                                                                                                                  \
    TARGET INLINE s32x8 dot_scaled_##SUFFIX(s32x8 sums, u8x32 codes, s8x32 rounded, int16_t low, int16_t high) {       \
        const __m256i two = _mm256_maddubs_epi16((__m256i)codes, (__m256i)rounded);                                    \
        return (s32x8)TWO((__m256i)sums, two, factors_##SUFFIX(low, high));                                            \
    }

#define TARGET __attribute__((target("arch=x86-64-v3,avxvnni")))
#define NAME(function) function##_avx_vnni
BY_FOUR(avx_vnni, _mm256_dpbusd_avx_epi32, _mm256_dpwssd_avx_epi32)
#include "weights_blocks.h"
#undef TARGET
#undef NAME

#define TARGET __attribute__((target("arch=x86-64-v4,avx512vnni")))
#define NAME(function) function##_avx512_vnni
BY_FOUR(avx512_vnni, _mm256_dpbusd_epi32, _mm256_dpwssd_epi32)
#include "weights_blocks.h"
#undef TARGET
#undef NAME
#endif

#if defined(__aarch64__) && defined(__GNUC__)
#define NEON
#include <arm_neon.h>

#if defined(__clang__)
#define TARGET __attribute__((target("dotprod")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define NAME(function) function##_neon

/* The instruction itself: some compilers have its intrinsic only where all processors must have it. */
TARGET INLINE int32x4_t four_neon(int8x16_t a, int8x16_t b) {
    int32x4_t sums = vdupq_n_s32(0);
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sums) : "w"(a), "w"(b));
    return sums;
}

TARGET INLINE s32x8 dot_signed_neon(s8x32 codes, s8x32 rounded) {
    int8x16_t a[2], b[2];
    s32x8 found;
    memcpy(a, &codes, 32);
    memcpy(b, &rounded, 32);
    const int32x4_t sums[2] = {four_neon(a[0], b[0]), four_neon(a[1], b[1])};
    memcpy(&found, sums, 32);
    return found;
}

TARGET INLINE s32x8 dot_neon(u8x32 codes, s8x32 rounded) { return dot_signed_neon((s8x32)codes, rounded); }

TARGET INLINE s32x8 dot_scaled_neon(s32x8 sums, u8x32 codes, s8x32 rounded, int16_t low, int16_t high) {
    return sums + dot_neon(codes, rounded) * (s32x8){low, low, low, low, high, high, high, high};
}

TARGET INLINE f32x8 add_neon(f32x8 a, f32x8 b, f32x8 c) {
    float32x4_t x[2], y[2], z[2];
    f32x8 found;
    memcpy(x, &a, 32);
    memcpy(y, &b, 32);
    memcpy(z, &c, 32);
    for (int i = 0; i < 2; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
    memcpy(&found, z, 32);
    return found;
}

TARGET INLINE u8x32 nibbles_neon(const uint8_t *from) {
    const uint8x16_t both = vld1q_u8(from), apart[2] = {vandq_u8(both, vdupq_n_u8(15)), vshrq_n_u8(both, 4)};
    u8x32 found;
    memcpy(&found, apart, 32);
    return found;
}

TARGET INLINE u8x32 spread_neon(uint32_t bits) {
    const uint8x16_t each = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)), one = vdupq_n_u8(16);
    uint8x16_t spread[2];
    u8x32 found;
    for (int i = 0; i < 2; i++, bits >>= 16) {
        const uint8x16_t bytes = vcombine_u8(vdup_n_u8((uint8_t)bits), vdup_n_u8((uint8_t)(bits >> 8)));
        spread[i] = vandq_u8(vtstq_u8(bytes, each), one);
    }
    memcpy(&found, spread, 32);
    return found;
}

TARGET INLINE f32x8 halves_neon(const uint8_t *from) {
    float16x4_t halves[2];
    f32x8 found;
    memcpy(halves, from, 16);
    const float32x4_t floats[2] = {vcvt_f32_f16(halves[0]), vcvt_f32_f16(halves[1])};
    memcpy(&found, floats, 32);
    return found;
}

TARGET INLINE float half_neon(uint16_t half) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half))), 0);
}

#include "weights_blocks.h"
#undef TARGET
#undef NAME
#endif

static const WeightProducts plain = {multiply_plain, unpack_plain};
#ifdef X86
static const WeightProducts avx2 = {multiply_avx2, unpack_avx2};
static const WeightProducts avx_vnni = {multiply_avx_vnni, unpack_avx_vnni};
static const WeightProducts avx512_vnni = {multiply_avx512_vnni, unpack_avx512_vnni};
#endif
#ifdef NEON
static const WeightProducts neon = {multiply_neon, unpack_neon};
#endif

/* The functions of a kind: 0 the best that this processor has, 1 plain C, 2 AVX2, 3 AVX-VNNI, 4 AVX-512 VNNI, 5 NEON with
 * dot products. NULL where the processor has none of that kind. */
const WeightProducts *kvswap_weight_products(int64_t kind) {
#if defined(X86) || defined(NEON)
    const int has = kvswap_processor();
#endif
#ifdef X86
    if ((kind == 0 || kind == 4) && has & HAS_AVX512_VNNI) return &avx512_vnni;
    if ((kind == 0 || kind == 3) && has & HAS_AVX_VNNI) return &avx_vnni;
    if ((kind == 0 || kind == 2) && has & HAS_X86_V3) return &avx2;
#endif
#ifdef NEON
    if ((kind == 0 || kind == 5) && has & HAS_DOTPROD) return &neon;
#endif
    return kind < 2 ? &plain : NULL;
}
