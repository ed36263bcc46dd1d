/* Products with the low-rank factors, in float32. Vectors of 16 are the compiler's: one register, two or four. */

#include "lowrank.h"

typedef float Vector __attribute__((vector_size(64), aligned(4)));

ALWAYS_INLINE float sum_of(const Vector *v) {
    float sum[16];
    memcpy(sum, v, sizeof sum);
    for (int h = 8; h; h /= 2)
        for (int k = 0; k < h; k++) sum[k] += sum[k + h];
    return sum[0];
}

/* A block of `rows` x `tokens` sums, constants to the compiler, that stay in registers. */
ALWAYS_INLINE void block_of_products(float *out, int64_t out_stride, const float *a, int64_t a_stride, const float *b,
                                     int64_t b_stride, int64_t n, const int rows, const int tokens) {
    Vector sum[4][4];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < tokens; j++) sum[i][j] = (Vector){0};
    for (int64_t c = 0; c < n; c += 16) {
        Vector left[4];
        UNROLL for (int i = 0; i < rows; i++) left[i] = *(const Vector *)(a + i * a_stride + c);
        UNROLL for (int j = 0; j < tokens; j++) {
            Vector right = *(const Vector *)(b + j * b_stride + c);
            UNROLL for (int i = 0; i < rows; i++) sum[i][j] += left[i] * right;
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < tokens; j++) out[j * out_stride + i] += sum_of(&sum[i][j]);
}

ALWAYS_INLINE void hf_lrq_products_body(float *out, int64_t out_stride, const float *a, int64_t a_stride, int64_t rows,
                                        const float *b, int64_t b_stride, int64_t tokens, int64_t n) {
    for (int64_t i = 0; i < rows; i += 4)
        for (int64_t j = 0; j < tokens; j += 4) {
            float *to = out + j * out_stride + i;
            const float *left = a + i * a_stride, *right = b + j * b_stride;
            if (rows - i >= 4 && tokens - j >= 4)
                block_of_products(to, out_stride, left, a_stride, right, b_stride, n, 4, 4);
            else if (rows - i >= 4)
                for (int64_t k = 0; k < tokens - j; k++)
                    block_of_products(to + k * out_stride, out_stride, left, a_stride, right + k * b_stride, b_stride, n, 4, 1);
            else
                for (int64_t m = 0; m < rows - i; m++)
                    for (int64_t k = 0; k < smaller(4, tokens - j); k++)
                        block_of_products(to + k * out_stride + m, out_stride, left + m * a_stride, a_stride,
                                          right + k * b_stride, b_stride, n, 1, 1);
        }
}
HF_LRQ_CLONES(, hf_lrq_products,
              (float *out, int64_t out_stride, const float *a, int64_t a_stride, int64_t rows, const float *b,
               int64_t b_stride, int64_t tokens, int64_t n),
              (out, out_stride, a, a_stride, rows, b, b_stride, tokens, n))

ALWAYS_INLINE void block_of_rows(float *out, int64_t out_stride, const float *a, int64_t ranks, const float *t,
                                 int64_t tokens, int64_t used, const int rows) {
    Vector sum[8];
    UNROLL for (int i = 0; i < rows; i++) sum[i] = (Vector){0};
    for (int64_t k = 0; k < ranks; k++) {
        Vector right = *(const Vector *)(t + k * tokens);
        UNROLL for (int i = 0; i < rows; i++) sum[i] += right * a[i * ranks + k];
    }
    UNROLL for (int i = 0; i < rows; i++) {
        float values[16];
        memcpy(values, &sum[i], sizeof values);
        for (int64_t j = 0; j < used; j++) out[j * out_stride + i] += values[j];
    }
}

ALWAYS_INLINE void hf_lrq_expand_body(float *out, int64_t out_stride, const float *a, int64_t rows, int64_t ranks,
                                      const float *t, int64_t tokens, int64_t used) {
    for (int64_t i = 0; i < rows; i += 8)
        for (int64_t j = 0; j < used; j += 16) {
            float *to = out + j * out_stride + i;
            int64_t count = smaller(16, used - j);
            if (rows - i >= 8)
                block_of_rows(to, out_stride, a + i * ranks, ranks, t + j, tokens, count, 8);
            else
                for (int64_t m = 0; m < rows - i; m++)
                    block_of_rows(to + m, out_stride, a + (i + m) * ranks, ranks, t + j, tokens, count, 1);
        }
}
HF_LRQ_CLONES(, hf_lrq_expand,
              (float *out, int64_t out_stride, const float *a, int64_t rows, int64_t ranks, const float *t,
               int64_t tokens, int64_t used),
              (out, out_stride, a, rows, ranks, t, tokens, used))
