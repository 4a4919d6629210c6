/* Stored elements as floats. */
#ifndef KVSWAP_CONVERT_H
#define KVSWAP_CONVERT_H

#include "common.h"

/* `count` elements as floats; `from` need not be aligned. */
typedef void Convert(const void *from, int64_t count, float *to);

/* The fastest of this processor. */
Convert *kvswap_convert_float16(void);
Convert *kvswap_convert_bfloat16(void);

#endif
