/* What the compiled loops share. Plain C without Python or NumPy headers. */
#ifndef KVSWAP_COMMON_H
#define KVSWAP_COMMON_H

#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* The same function for processors of several generations; the loader picks one. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address)
#endif

#define INLINE static inline __attribute__((always_inline))

/* A float16 as float, without branches, so that a compiler makes vectors of it. */
INLINE float half_to_float(uint16_t half) {
    const uint32_t moved = (uint32_t)(half & 0x7fff) << 13, exponent = moved & 0x0f800000u;
    const uint32_t one = 113u << 23;
    uint32_t bits = moved + (112u << 23);
    float value, smallest, small;
    bits += exponent == 0x0f800000u ? 112u << 23 : 0u; /* infinite or not a number */
    const uint32_t subnormal = moved + one;
    memcpy(&smallest, &one, 4);
    memcpy(&small, &subnormal, 4);
    small -= smallest;
    memcpy(&value, &bits, 4);
    value = exponent == 0 ? small : value;
    memcpy(&bits, &value, 4);
    bits |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

/* The value that `count` of `size` values are at least as large as; `values` are reordered, the largest `count` of them
 * to the front. Hoare's selection. */
INLINE float threshold(float *values, int64_t size, int64_t count) {
    int64_t low = 0, high = size - 1, place = count - 1;
    while (low < high) {
        const float middle = values[(low + high) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (values[i] > middle) i++;
            while (values[j] < middle) j--;
            if (i <= j) {
                const float other = values[i];
                values[i++] = values[j];
                values[j--] = other;
            }
        }
        if (place <= j)
            high = j;
        else if (place >= i)
            low = i;
        else
            break;
    }
    return values[place];
}

#endif
