/* The `int` codebook: the integers as its kernels want them, and the kernel in plain C. */

#include "uniform.h"

#include "floats.h"

int64_t hf_lrq_uniform_unit_bytes(const Planes *planes) {
    int64_t columns = unit_columns(planes->kernel->bits);
    if (planes->kernel->arrangement == UNIFORM_WORDS) return planes->token_planes * columns * (int64_t)sizeof(int16_t);
    return planes->digits * columns + (planes->digits + 1) / 2 * LANES * (int64_t)sizeof(int32_t);
}

int64_t hf_lrq_uniform_bytes(const Planes *planes) {
    int64_t parts = planes->columns / hf_lrq_uniform_columns(planes->kernel);
    if (planes->kernel->arrangement == UNIFORM_TILES)
        return ceil_div(planes->tokens * planes->token_planes, LANES) * parts * UNIFORM_BLOCK_BYTES;
    return planes->tokens * parts * hf_lrq_uniform_unit_bytes(planes);
}

/* The column, in its unit, of position i of vector v. */
ALWAYS_INLINE int column_of(int bits, int v, int i) { return bits == 2 ? 4 * i + v : bits == 4 ? 2 * i + v : i; }

ALWAYS_INLINE void place_unit(uint8_t *unit, const int32_t *restrict values, int plane, int digits, int words, int bits) {
    int columns = unit_columns(bits);
    for (int v = 0; v < vectors_of_unit(bits); v++) {
        if (words) {
            int16_t *to = (int16_t *)(void *)unit + plane * columns + v * VECTOR;
            for (int i = 0; i < VECTOR; i++) to[i] = (int16_t)values[column_of(bits, v, i)];
        } else {
            int8_t *to = (int8_t *)unit + plane * columns + v * VECTOR;
            int32_t *excess = (int32_t *)(void *)(unit + digits * columns) + plane / 2 * LANES;
            int32_t weight = ((1 << bits) - 1) * (plane == 1 ? 256 : 1);
            if (plane != 1 && v == 0) memset(excess, 0, LANES * sizeof *excess);
            for (int i = 0; i < VECTOR; i++) to[i] = (int8_t)values[column_of(bits, v, i)];
            for (int lane = 0; lane < LANES; lane++)
                excess[lane] += weight * (to[4 * lane] + to[4 * lane + 1] + to[4 * lane + 2] + to[4 * lane + 3]);
        }
    }
}

ALWAYS_INLINE void place_units_body(uint8_t *unit, const int32_t *values, int64_t units, int64_t bytes, int plane,
                                    int digits, int words, int bits) {
    for (int64_t u = 0; u < units; u++, unit += bytes, values += unit_columns(bits)) {
        if (bits == 2)
            place_unit(unit, values, plane, digits, words, 2);
        else if (bits == 4)
            place_unit(unit, values, plane, digits, words, 4);
        else
            place_unit(unit, values, plane, digits, words, bits);
    }
}
HF_LRQ_CLONES(static, place_units,
              (uint8_t *unit, const int32_t *values, int64_t units, int64_t bytes, int plane, int digits, int words,
               int bits),
              (unit, values, units, bytes, plane, digits, words, bits))

/* The column, in its block, of byte j of a half. */
ALWAYS_INLINE int column_of_half(int bits, int half, int j) {
    if (bits == 4) return 2 * j + half;
    return bits == 2 ? 4 * (j % 32) + 2 * half + j / 32 : 64 * half + j;
}

ALWAYS_INLINE void place_block(uint8_t *block, const int32_t *restrict values, int lane, float scale, int bits) {
    int8_t bytes[UNIFORM_BLOCK];
    int32_t sum = 0;
    for (int half = 0; half < 2; half++)
        for (int j = 0; j < 64; j++) bytes[64 * half + j] = (int8_t)values[column_of_half(bits, half, j)];
    for (int j = 0; j < UNIFORM_BLOCK; j++) sum += values[j];
    for (int j = 0; j < UNIFORM_BLOCK / 4; j++) memcpy(block + (j * LANES + lane) * 4, bytes + 4 * j, 4);
    float *after = (float *)(void *)(block + 2 * 1024);
    after[lane] = 0.5f * (float)(((1 << bits) - 1) * sum);
    after[LANES + lane] = scale;
}

ALWAYS_INLINE void place_blocks_body(const Planes *planes, const int32_t *values, int64_t token, int64_t plane) {
    int64_t blocks = planes->columns / UNIFORM_BLOCK;
    int bits = planes->kernel->bits, lane = (int)(plane % LANES);
    const float *scales = planes->scales + token * hf_lrq_scales_of_token(planes);
    uint8_t *to = planes->x + plane / LANES * blocks * UNIFORM_BLOCK_BYTES;
    for (int64_t b = 0; b < blocks; b++, to += UNIFORM_BLOCK_BYTES, values += UNIFORM_BLOCK) {
        float scale = planes->blocks ? scales[b * UNIFORM_BLOCK / SCALE_COLUMNS] : 1;
        if (bits == 2)
            place_block(to, values, lane, scale, 2);
        else if (bits == 4)
            place_block(to, values, lane, scale, 4);
        else
            place_block(to, values, lane, scale, bits);
    }
}
HF_LRQ_CLONES(static, place_blocks, (const Planes *planes, const int32_t *values, int64_t token, int64_t plane),
              (planes, values, token, plane))

/* The lowest digit to `low`, the rest stays. */
ALWAYS_INLINE void take_digit_body(int32_t *restrict low, int32_t *restrict integers, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        low[i] = (int8_t)integers[i];
        integers[i] = (integers[i] + 128) >> 8;
    }
}
HF_LRQ_CLONES(static, take_digit, (int32_t *low, int32_t *integers, int64_t n), (low, integers, n))

void hf_lrq_uniform_place(Planes *planes, int64_t token, int32_t *integers, int32_t *scratch) {
    const Kernel *kernel = planes->kernel;
    int64_t n = planes->columns;
    for (int k = 0; k < planes->token_planes; k++) {
        const int32_t *values = integers;
        if (k + 1 < planes->token_planes) {
            take_digit(scratch, integers, n);
            values = scratch;
        }
        if (kernel->arrangement == UNIFORM_TILES) {
            place_blocks(planes, values, token, token * planes->token_planes + k);
        } else {
            int64_t units = n / unit_columns(kernel->bits), bytes = hf_lrq_uniform_unit_bytes(planes);
            place_units(planes->x + token * units * bytes, values, units, bytes, k, planes->digits,
                        kernel->arrangement == UNIFORM_WORDS, kernel->bits);
        }
    }
}

/* One row. scales: [groups]. */
ALWAYS_INLINE void row_of(float *to, int64_t stride, const Planes *planes, const UniformMatrix *matrix,
                          const uint8_t *codes, const float *scales, const int bits) {
    int64_t columns = unit_columns(bits), units = planes->columns / columns, bytes = hf_lrq_uniform_unit_bytes(planes);
    int64_t run = hf_lrq_uniform_run(matrix), part = run * VECTOR / columns; /* of each vector */
    for (int64_t token = 0; token < planes->tokens; token++) to[token * stride] = 0;
    for (int64_t u = 0; u < units; u++) {
        int16_t y[4 * VECTOR];
        hf_lrq_odd_numbers(y, codes, u, matrix->row_bytes, bits);
        for (int64_t token = 0; token < planes->tokens; token++) {
            const int16_t *x = (const int16_t *)(const void *)(planes->x + (token * units + u) * bytes);
            float scale_of_x = hf_lrq_uniform_scale_of_x(planes, token, u * columns);
            for (int64_t at = 0, column = u * columns; at < VECTOR; at += part, column += run) {
                float scale = scales[smaller(column / matrix->group_size, matrix->groups - 1)] * scale_of_x;
                for (int k = 0; k < planes->token_planes; k++) {
                    int32_t sum = 0;
                    for (int v = 0; v < vectors_of_unit(bits); v++)
                        for (int64_t i = at; i < at + part; i++)
                            sum += (int32_t)y[v * VECTOR + i] * x[k * columns + v * VECTOR + i];
                    to[token * stride] += (float)sum * (scale * planes->factor[k]);
                }
            }
        }
    }
}

int hf_lrq_uniform_portable(const Planes *planes, const UniformMatrix *matrix, float *to, int64_t stride, int64_t first,
                            int64_t rows) {
    float *scales = allocate((size_t)matrix->groups * sizeof *scales);
    if (!scales) return -1;
    for (int64_t row = first; row < first + rows; row++, to++) {
        const uint8_t *codes = matrix->codes + row * matrix->row_bytes;
        hf_lrq_to_float(scales, matrix->scales, row * matrix->groups, matrix->groups, matrix->scales_kind);
        if (matrix->bits == 2)
            row_of(to, stride, planes, matrix, codes, scales, 2);
        else if (matrix->bits == 3)
            row_of(to, stride, planes, matrix, codes, scales, 3);
        else if (matrix->bits == 4)
            row_of(to, stride, planes, matrix, codes, scales, 4);
        else if (matrix->bits == 6)
            row_of(to, stride, planes, matrix, codes, scales, 6);
        else
            row_of(to, stride, planes, matrix, codes, scales, 8);
    }
    free(scales);
    return 0;
}
