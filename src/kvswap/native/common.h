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

/* exp(x) to 2e-7 relative, between e^-87 and e^88: 2^n by the exponent's bits, e^r on [-ln 2 / 2, ln 2 / 2] by a
 * polynomial of degree 7 (Cephes). */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float moved = x * 1.44269504f + 12582912.0f, n = moved - 12582912.0f; /* n is in the last bits of `moved` */
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits, power;
    memcpy(&bits, &p, 4);
    memcpy(&power, &moved, 4);
    bits += power << 23;
    memcpy(&p, &bits, 4);
    return x != x ? x : p;
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
