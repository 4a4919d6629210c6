/* Stored elements as floats. Processors with F16C have an instruction for float16, which takes a twentieth of the time. */
#include "convert.h"
#include "processor.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#else
#define from_float16_f16c from_float16
#endif

CLONES static void from_bfloat16(const void *from, int64_t count, float *to) {
    const uint8_t *bytes = from;
    for (int64_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, bytes + 2 * i, 2);
        const uint32_t bits = (uint32_t)half << 16;
        memcpy(to + i, &bits, 4);
    }
}

CLONES static void from_float16(const void *from, int64_t count, float *to) {
    const uint8_t *bytes = from;
    for (int64_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, bytes + 2 * i, 2);
        to[i] = half_to_float(half);
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx,f16c"))) static void from_float16_f16c(const void *from, int64_t count, float *to) {
    const uint8_t *bytes = from;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(bytes + 2 * i))));
    from_float16(bytes + 2 * i, count - i, to + i);
}
#endif

Convert *kvswap_convert_float16(void) { return kvswap_processor() & HAS_F16C ? from_float16_f16c : from_float16; }

Convert *kvswap_convert_bfloat16(void) { return from_bfloat16; }
