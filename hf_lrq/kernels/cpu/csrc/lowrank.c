/* Products with the low-rank factors, in float32. Vectors of 16 are the compiler's: one register, two or four. */

#include "lowrank.h"

typedef float Vector __attribute__((vector_size(64), aligned(4)));
typedef int32_t Words __attribute__((vector_size(64), aligned(4)));

/* Adds in the same order as `add_sums_of_16`. */
ALWAYS_INLINE float sum_of(const Vector *v) {
    float sum[16];
    memcpy(sum, v, sizeof sum);
    for (int h = 8; h; h /= 2)
        for (int k = 0; k < h; k++) sum[k] += sum[k + h];
    return sum[0];
}

#if defined(__clang__)
#define PICK(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define PICK(A, B, ...) __builtin_shuffle(A, B, (Words){__VA_ARGS__})
#endif
/* A and B hold sums of parts, so many for a row; the halves of each row are added. */
#define HALVES_OF_16(A, B)                                                                                             \
    (PICK(A, B, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                                              \
     PICK(A, B, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define HALVES_OF_8(A, B)                                                                                              \
    (PICK(A, B, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +                                            \
     PICK(A, B, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#define HALVES_OF_4(A, B)                                                                                              \
    (PICK(A, B, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +                                            \
     PICK(A, B, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
#define HALVES_OF_2(A, B)                                                                                              \
    (PICK(A, B, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +                                           \
     PICK(A, B, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))

/* Adds the sum of each of 16 vectors, which are overwritten, to 16 numbers. */
ALWAYS_INLINE void add_sums_of_16(float *to, Vector *v) {
    UNROLL for (int i = 0; i < 8; i++) v[i] = HALVES_OF_16(v[2 * i], v[2 * i + 1]);
    UNROLL for (int i = 0; i < 4; i++) v[i] = HALVES_OF_8(v[2 * i], v[2 * i + 1]);
    UNROLL for (int i = 0; i < 2; i++) v[i] = HALVES_OF_4(v[2 * i], v[2 * i + 1]);
    *(Vector *)to += HALVES_OF_2(v[0], v[1]);
}

/* A block of `rows` x `tokens` sums, constants to the compiler, that stay in registers. */
ALWAYS_INLINE void block_of_products(float *out, int64_t out_stride, const float *a, int64_t a_stride, const float *b,
                                     int64_t b_stride, int64_t n, const int rows, const int tokens) {
    Vector sum[16][4];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < tokens; j++) sum[i][j] = (Vector){0};
    for (int64_t c = 0; c < n; c += 16) {
        Vector right[4];
        UNROLL for (int j = 0; j < tokens; j++) right[j] = *(const Vector *)(b + j * b_stride + c);
        UNROLL for (int i = 0; i < rows; i++) {
            Vector left = *(const Vector *)(a + i * a_stride + c);
            UNROLL for (int j = 0; j < tokens; j++) sum[i][j] += left * right[j];
        }
    }
    if (rows == 16) {
        UNROLL for (int j = 0; j < tokens; j++) {
            Vector of_rows[16];
            UNROLL for (int i = 0; i < 16; i++) of_rows[i] = sum[i][j];
            add_sums_of_16(out + j * out_stride, of_rows);
        }
        return;
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < tokens; j++) out[j * out_stride + i] += sum_of(&sum[i][j]);
}

ALWAYS_INLINE void hf_lrq_products_body(float *out, int64_t out_stride, const float *a, int64_t a_stride, int64_t rows,
                                        const float *b, int64_t b_stride, int64_t tokens, int64_t n) {
#define BLOCK(ROWS, TOKENS)                                                                                            \
    (block_of_products(out + j * out_stride + i, out_stride, a + i * a_stride, a_stride, b + j * b_stride, b_stride, n, \
                       ROWS, TOKENS),                                                                                  \
     i += ROWS)
    for (int64_t j = 0, many; j < tokens; j += many) {
        many = tokens - j >= 4 ? 4 : 1;
        for (int64_t i = 0; i < rows;) {
            if (many == 4 && rows - i >= 4)
                BLOCK(4, 4);
            else if (many == 4)
                BLOCK(1, 4);
            else if (rows - i >= 16)
                BLOCK(16, 1);
            else if (rows - i >= 4)
                BLOCK(4, 1);
            else
                BLOCK(1, 1);
        }
    }
#undef BLOCK
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
