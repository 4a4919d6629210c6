/* What the processor can do, asked once. Not by __builtin_cpu_supports: compilers know different names. */
#ifndef KVSWAP_PROCESSOR_H
#define KVSWAP_PROCESSOR_H

#include "common.h"

/* X86_V3 is a level of x86-64: AVX2 and what came with it. AVX512_VNNI includes the level after it. */
enum { HAS_F16C = 1, HAS_X86_V3 = 2, HAS_AVX_VNNI = 4, HAS_AVX512_VNNI = 8, HAS_DOTPROD = 16 };

/* The sum of the above that holds here, and that the system keeps the registers of. Any thread. */
int kvswap_processor(void);

#endif
