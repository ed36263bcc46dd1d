/* Codes of the `int` codebook to values. */

#include <stdatomic.h>

#include "floats.h"
#include "pool.h"
#include "uniform.h"

enum { ROWS_OF_A_PART = 16, STRIP = 1024 };

typedef struct {
    UniformMatrix matrix; /* of the rows that are wanted; scales NULL: none */
    uint8_t *values;
    int64_t rows, columns, kind;
    double gain;
    atomic_int_least64_t next;
} Decoding;

/* Odd numbers of n codes, n a multiple of 8, in the order of the columns. */
ALWAYS_INLINE void in_order(int16_t *restrict to, const uint8_t *restrict codes, int64_t n, int bits) {
    int most = (1 << bits) - 1;
    if (bits == 3 || bits == 6) {
        for (int64_t i = 0; i < n / 8; i++) {
            uint64_t eight = hf_lrq_eight_codes(codes + bits * i, bits);
            uint8_t apart[8];
            memcpy(apart, &eight, 8);
            for (int k = 0; k < 8; k++) to[8 * i + k] = (int16_t)(2 * apart[k] - most);
        }
    } else {
        for (int64_t i = 0; i < n * bits / 8; i++)
            for (int k = 0; k < 8 / bits; k++) to[8 / bits * i + k] = (int16_t)(2 * (codes[i] >> bits * k & most) - most);
    }
}

ALWAYS_INLINE void odd_numbers_body(int16_t *to, const uint8_t *codes, int64_t n, int bits) {
    if (bits == 2)
        in_order(to, codes, n, 2);
    else if (bits == 3)
        in_order(to, codes, n, 3);
    else if (bits == 4)
        in_order(to, codes, n, 4);
    else if (bits == 6)
        in_order(to, codes, n, 6);
    else
        in_order(to, codes, n, 8);
}
HF_LRQ_CLONES(static, odd_numbers, (int16_t *to, const uint8_t *codes, int64_t n, int bits), (to, codes, n, bits))

ALWAYS_INLINE void times_body(float *restrict to, const int16_t *restrict y, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = scale * (float)y[i];
}
HF_LRQ_CLONES(static, times, (float *to, const int16_t *y, float scale, int64_t n), (to, y, scale, n))

/* Levels, rounded once. */
ALWAYS_INLINE void levels_body(float *restrict to, const int16_t *restrict y, double gain, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = (float)(gain * (double)y[i]);
}
HF_LRQ_CLONES(static, levels, (float *to, const int16_t *y, double gain, int64_t n), (to, y, gain, n))

static void one_row(const Decoding *d, int64_t row) {
    const UniformMatrix *m = &d->matrix;
    int16_t y[STRIP];
    float values[STRIP];
    for (int64_t column = 0; column < d->columns; column += STRIP) {
        int64_t n = smaller(STRIP, d->columns - column);
        odd_numbers(y, m->codes + row * m->row_bytes + column * m->bits / 8, ceil_div(n, 8) * 8, m->bits);
        if (!m->scales) levels(values, y, d->gain, n);
        for (int64_t at = 0, next; m->scales && at < n; at = next) {
            int64_t group = smaller((column + at) / m->group_size, m->groups - 1);
            next = group + 1 < m->groups ? smaller(n, (group + 1) * m->group_size - column) : n;
            float scale;
            hf_lrq_to_float(&scale, m->scales, row * m->groups + group, 1, m->scales_kind);
            times(values + at, y + at, scale * (float)d->gain, next - at);
        }
        hf_lrq_from_float(d->values, row * d->columns + column, values, n, (int)d->kind);
    }
}

static void work(void *context) {
    Decoding *d = context;
    int64_t first;
    while ((first = atomic_fetch_add(&d->next, ROWS_OF_A_PART)) < d->rows)
        for (int64_t row = first; row < smaller(first + ROWS_OF_A_PART, d->rows); row++) one_row(d, row);
}

/* values: [rows][columns] of a kind of `floats.h`; codes: [rows][ceil(columns / 8) * bits]; scales: [rows][groups] or
   NULL. gain: half the step. */
HF_LRQ_EXPORT void hf_lrq_decode_uniform(const uint8_t *codes, const void *scales, void *values, int64_t rows,
                                         int64_t columns, int64_t kind, int64_t bits, int64_t scales_kind, int64_t groups,
                                         int64_t group_size, int64_t threads, double gain) {
    Decoding decoding = {.matrix = {.codes = codes,
                                    .scales = scales,
                                    .scales_kind = (int)scales_kind,
                                    .bits = (int)bits,
                                    .row_bytes = ceil_div(columns, 8) * bits,
                                    .groups = groups,
                                    .group_size = group_size},
                         .values = values,
                         .rows = rows,
                         .columns = columns,
                         .kind = kind,
                         .gain = gain};
    hf_lrq_run(work, &decoding, (int)threads);
}
