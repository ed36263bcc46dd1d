/* The `int` codebook in 16-bit arithmetic (AVX2). */

#include "uniform.h"

#include "floats.h"

#if HF_LRQ_HAS_AVX2
#include <immintrin.h>

#define LOAD(at) _mm256_loadu_si256((const __m256i *)(at))

/* One row. sums: [token][8]. */
#define ROW(BITS)                                                                                                      \
    AVX2_TARGET static void row_##BITS(float *sums, const Planes *planes, const UniformMatrix *matrix,                 \
                                       const uint8_t *codes, const float *scales) {                                    \
        enum { COLUMNS = VECTOR * (BITS == 2 ? 4 : BITS == 4 ? 2 : 1), VECTORS = COLUMNS / VECTOR };                   \
        int64_t units = planes->columns / COLUMNS, bytes = hf_lrq_uniform_unit_bytes(planes);                          \
        int64_t run = hf_lrq_uniform_run(matrix), part = run / VECTORS;                                                \
        for (int64_t u = 0; u < units; u++) {                                                                          \
            int16_t y[COLUMNS];                                                                                        \
            hf_lrq_odd_numbers(y, codes, u, matrix->row_bytes, BITS);                                                  \
            for (int64_t at = 0, column = u * COLUMNS; at < VECTOR; at += part, column += run) {                       \
                float scale = scales[smaller(column / matrix->group_size, matrix->groups - 1)];                        \
                for (int64_t token = 0; token < planes->tokens; token++) {                                             \
                    const int16_t *x = (const int16_t *)(const void *)(planes->x + (token * units + u) * bytes);       \
                    float by = scale * hf_lrq_uniform_scale_of_x(planes, token, column);                               \
                    __m256 total = _mm256_loadu_ps(sums + 8 * token);                                                  \
                    for (int k = 0; k < planes->token_planes; k++, x += COLUMNS) {                                     \
                        __m256i sum = _mm256_setzero_si256();                                                          \
                        for (int64_t i = at; i < at + part; i += 16)                                                   \
                            UNROLL for (int v = 0; v < VECTORS; v++)                                                   \
                                sum = _mm256_add_epi32(                                                                \
                                    sum, _mm256_madd_epi16(LOAD(y + v * VECTOR + i), LOAD(x + v * VECTOR + i)));       \
                        __m256 factor = _mm256_set1_ps(by * planes->factor[k]);                                        \
                        total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, total);                               \
                    }                                                                                                  \
                    _mm256_storeu_ps(sums + 8 * token, total);                                                         \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
ROW(2)
ROW(3)
ROW(4)
ROW(8)

int hf_lrq_uniform_avx2(const Planes *planes, const UniformMatrix *matrix, float *to, int64_t stride, int64_t first,
                        int64_t rows) {
    void (*row_of)(float *, const Planes *, const UniformMatrix *, const uint8_t *, const float *) =
        matrix->bits == 2 ? row_2 : matrix->bits == 3 ? row_3 : matrix->bits == 4 ? row_4 : row_8;
    if (hf_lrq_uniform_run(matrix) / vectors_of_unit(matrix->bits) % 16)
        return hf_lrq_uniform_portable(planes, matrix, to, stride, first, rows);
    size_t size = (size_t)(8 * planes->tokens) * sizeof(float);
    float *sums = allocate(size), *scales = allocate((size_t)matrix->groups * sizeof *scales);
    if (!sums || !scales) {
        free(sums);
        free(scales);
        return -1;
    }
    for (int64_t row = first; row < first + rows; row++, to++) {
        memset(sums, 0, size);
        hf_lrq_to_float(scales, matrix->scales, row * matrix->groups, matrix->groups, matrix->scales_kind);
        row_of(sums, planes, matrix, matrix->codes + row * matrix->row_bytes, scales);
        for (int64_t token = 0; token < planes->tokens; token++) {
            const float *s = sums + 8 * token;
            to[token * stride] = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
        }
    }
    free(sums);
    free(scales);
    return 0;
}

#endif
