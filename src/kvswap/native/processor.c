#include "processor.h"

#define ASKED 1024 /* so that a processor with none of these is asked once as well */

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>

#define BIT(number) (1u << (number))
#define ALL(bits, of) (((bits) & (of)) == (of))
#define V3_FIRST                                                                                                       \
    (BIT(0) | BIT(9) | BIT(12) | BIT(13) | BIT(19) | BIT(20) | BIT(22) | BIT(23) | BIT(28) | BIT(29)) /* SSE3 to F16C */
#define V3_SEVENTH (BIT(3) | BIT(5) | BIT(8))                           /* BMI1, AVX2, BMI2 */
#define V4_SEVENTH (BIT(16) | BIT(17) | BIT(28) | BIT(30) | BIT(31))    /* AVX-512 F, DQ, CD, BW, VL */

static int ask(void) {
    unsigned eax, ebx, ecx, edx, first, extended = 0, seventh = 0, vnni = 0, kept, high;
    int found = 0;
    if (!__get_cpuid(1, &eax, &ebx, &first, &edx) || !ALL(first, BIT(27) | BIT(28))) return 0; /* OSXSAVE, AVX */
    __asm__ volatile("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));
    if (!ALL(kept, 0x06u)) return 0; /* the system keeps no AVX registers */
    if (__get_cpuid(0x80000001u, &eax, &ebx, &ecx, &edx)) extended = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        seventh = ebx;
        vnni = ecx & BIT(11);
        if (eax < 1 || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) eax = 0;
    } else
        eax = 0;
    if (first & BIT(29)) found |= HAS_F16C;
    if (!ALL(first, V3_FIRST) || !ALL(seventh, V3_SEVENTH) || !(extended & BIT(5))) return found;
    found |= HAS_X86_V3 | (eax & BIT(4) ? HAS_AVX_VNNI : 0);
    return found | (vnni && ALL(seventh, V4_SEVENTH) && ALL(kept, 0xe6u) ? HAS_AVX512_VNNI : 0);
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static int ask(void) { return getauxval(AT_HWCAP) & (1ul << 20) ? HAS_DOTPROD : 0; } /* HWCAP_ASIMDDP */

#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

static int ask(void) { return HAS_DOTPROD; } /* of all processors that this was compiled for */

#else

static int ask(void) { return 0; }

#endif

int kvswap_processor(void) {
    static int known; /* written twice where two threads come first: the same number */
    int found = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!found) {
        found = ask() | ASKED;
        __atomic_store_n(&known, found, __ATOMIC_RELAXED);
    }
    return found;
}
