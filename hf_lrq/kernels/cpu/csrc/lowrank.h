/* Products with the low-rank factors, in float32. */

#ifndef HF_LRQ_LOWRANK_H
#define HF_LRQ_LOWRANK_H

#include "common.h"

enum { RANK_PAD = 16, TOKEN_PAD = 16, FEW_TOKENS = 7 };

/* out[j * out_stride + i] += sum_c a[i * a_stride + c] * b[j * b_stride + c] over n columns, a multiple of 16; the order
   of a sum depends on n alone. */
void hf_lrq_products(float *out, int64_t out_stride, const float *a, int64_t a_stride, int64_t rows, const float *b,
                     int64_t b_stride, int64_t tokens, int64_t n);

/* out[j * out_stride + i] += sum_k a[i * ranks + k] * t[k * tokens + j]; `tokens` is a multiple of 16, of which the
   first `used` are written. */
void hf_lrq_expand(float *out, int64_t out_stride, const float *a, int64_t rows, int64_t ranks, const float *t,
                   int64_t tokens, int64_t used);

#endif
