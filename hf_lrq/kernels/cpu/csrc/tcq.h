/* The bit-step trellis: `dot` functions by tier, for 2, 3 and 4 bits. */

#ifndef HF_LRQ_TCQ_H
#define HF_LRQ_TCQ_H

#include "kernels.h"

DotFunction hf_lrq_tcq_scalar(int bits);
#if HF_LRQ_HAS_AVX2
DotFunction hf_lrq_tcq_avx2(int bits);
#endif
#if HF_LRQ_HAS_AVX512
DotFunction hf_lrq_tcq_avx512(int bits);
#endif

#endif
