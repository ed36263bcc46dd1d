/* Floats of any stored kind to and from float32, and the block Hadamard transform. */

#ifndef HF_LRQ_FLOATS_H
#define HF_LRQ_FLOATS_H

#include "common.h"

/* FOUR_BITS is two codes per byte, low nibble first, code c means c - 8; LOW_NIBBLES and HIGH_NIBBLES are the same bytes
   read as one code each. */
enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, INT8 = 3, FOUR_BITS = 4, LOW_NIBBLES = 5, HIGH_NIBBLES = 6 };

/* Values [first, first + n) of the array at `source`; n and first in values (even for FOUR_BITS). */
void hf_lrq_to_float(float *to, const void *source, int64_t first, int64_t n, int kind);
void hf_lrq_from_float(void *to, int64_t first, const float *from, int64_t n, int kind);

/* Orthonormal transform of each of the n / block blocks, in place; block is a power of two. */
void hf_lrq_hadamard(float *x, int64_t n, int64_t block);

#endif
