/* The byte-step trellis: `dot` functions by tier; suffix 1 for 2 bits and 2 for 4 bits (words of a row in a tile). */

#ifndef HF_LRQ_BT_H
#define HF_LRQ_BT_H

#include "kernels.h"

#define DOT_PARAMETERS                                                                                                 \
    const uint8_t *codes, const void *x_planes, int64_t first_tile, int64_t tiles, int64_t all_tiles, int planes,             \
        const uint32_t *multipliers, int32_t *acc

void hf_lrq_bt1_scalar(DOT_PARAMETERS);
void hf_lrq_bt2_scalar(DOT_PARAMETERS);
#if HF_LRQ_HAS_AVX2
/* Bytes of a word that make (b, a, b, a) and (a, b, a, b) of step j: b is byte j, a the byte before. In step 0 the byte
   before has been put in place of byte 3. */
#define FOUR(a, b) a, b, a, b, 4 + a, 4 + b, 4 + a, 4 + b, 8 + a, 8 + b, 8 + a, 8 + b, 12 + a, 12 + b, 12 + a, 12 + b
static const uint8_t NEW_FIRST[4][16] = {{FOUR(0, 3)}, {FOUR(1, 0)}, {FOUR(2, 1)}, {FOUR(3, 2)}};
static const uint8_t OLD_FIRST[4][16] = {{FOUR(3, 0)}, {FOUR(0, 1)}, {FOUR(1, 2)}, {FOUR(2, 3)}};

void hf_lrq_bt1_avx2(DOT_PARAMETERS);
void hf_lrq_bt2_avx2(DOT_PARAMETERS);
#endif
#if HF_LRQ_HAS_AVX512
void hf_lrq_bt1_avx512(DOT_PARAMETERS);
void hf_lrq_bt2_avx512(DOT_PARAMETERS);
#endif
#if HF_LRQ_HAS_AMX
void hf_lrq_bt1_amx(DOT_PARAMETERS);
void hf_lrq_bt2_amx(DOT_PARAMETERS);
#endif

#endif
