/* The `int` codebook with byte dot products (AVX-512 VNNI). */

#include "uniform.h"

#include "floats.h"

#if HF_LRQ_HAS_AVX512
#include <immintrin.h>

#include "three_bits.h"

enum { AHEAD = 2048, ROWS = 2, MOST_TOKENS = 4, ROWS_OF_SCALES = 8, LAST_UNITS = 2 };

/* What is the same for all rows. */
typedef struct {
    const Planes *planes;
    int64_t row_bytes, groups, units, full; /* `full` units can be read in place, the others from a copy */
    int64_t units_of_scale;                 /* that share a scale, where no unit has several; elsewhere: */
    int32_t *first, *lanes;                 /* [units] the group of lane 0; [units][16] groups from there */
} Plan;

/* Codes of a unit, one a byte. */
AVX512_TARGET ALWAYS_INLINE void unpack(__m512i *to, const uint8_t *codes, int bits) {
    const __m512i low = _mm512_set1_epi8((char)((1 << bits) - 1));
    if (bits == 8) {
        to[0] = _mm512_loadu_si512(codes);
    } else if (bits == 3) {
        to[0] = hf_lrq_three_bits(codes);
    } else {
        __m512i v = _mm512_loadu_si512(codes);
        UNROLL for (int k = 0; k < 8 / bits; k++) to[k] = _mm512_and_si512(_mm512_srli_epi16(v, (unsigned)(k * bits)), low);
    }
}

/* ROWS rows and some tokens from `token` on. rooms: the last units of the rows; shared: whether a unit has one scale. */
AVX512_TARGET ALWAYS_INLINE void some_rows(float *const *to, int64_t stride, const Plan *plan, const uint8_t *const *codes,
                                           const float *const *scales, uint8_t (*rooms)[LAST_UNITS][VECTOR], int64_t token,
                                           const int tokens, const int bits, const int digits, const int shared) {
    const Planes *planes = plan->planes;
    const int vectors = vectors_of_unit(bits), columns = unit_columns(bits), size = unit_bytes(bits);
    const int64_t bytes = digits * columns + (digits + 1) / 2 * 64;
    const uint8_t *x = planes->x + token * plan->units * bytes;
    const float *scales_of_x = planes->scales + token * hf_lrq_scales_of_token(planes);
    __m512 sum[ROWS][MOST_TOKENS];
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int t = 0; t < tokens; t++) sum[r][t] = _mm512_setzero_ps();
    int64_t group = 0, next = plan->units_of_scale;
    for (int64_t u = 0; u < plan->units; u++, x += bytes) {
        __m512i w[ROWS][4];
        __m512 scale[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) {
            unpack(w[r], u < plan->full ? codes[r] + u * size : rooms[r][u - plan->full], bits);
            _mm_prefetch((const char *)codes[r] + u * size + AHEAD, _MM_HINT_T0);
            scale[r] = shared ? _mm512_set1_ps(scales[r][group])
                              : _mm512_permutexvar_ps(_mm512_load_si512(plan->lanes + u * LANES),
                                                      _mm512_loadu_ps(scales[r] + plan->first[u]));
        }
        if (shared && u + 1 == next) group++, next += plan->units_of_scale;
        UNROLL for (int t = 0; t < tokens; t++) {
            const uint8_t *at = x + t * plan->units * bytes, *excess = at + digits * columns;
            UNROLL for (int r = 0; r < ROWS; r++) {
                __m512i s[3];
                UNROLL for (int d = 0; d < digits; d++) {
                    s[d] = _mm512_setzero_si512();
                    UNROLL for (int v = 0; v < vectors; v++)
                        s[d] = _mm512_dpbusd_epi32(s[d], w[r][v], _mm512_load_si512(at + d * columns + v * VECTOR));
                }
                __m512i odd = _mm512_slli_epi32(s[0], 1);
                if (digits > 1) odd = _mm512_add_epi32(odd, _mm512_slli_epi32(s[1], 9));
                __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(odd, _mm512_load_si512(excess)));
                if (digits == 1) {
                    float by = planes->blocks ? scales_of_x[t * hf_lrq_scales_of_token(planes) + u * columns / SCALE_COLUMNS] : 1;
                    value = _mm512_mul_ps(value, _mm512_set1_ps(by));
                }
                if (digits == 3) {
                    odd = _mm512_sub_epi32(_mm512_slli_epi32(s[2], 1), _mm512_load_si512(excess + 64));
                    value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(odd), _mm512_set1_ps(65536), value);
                }
                sum[r][t] = _mm512_fmadd_ps(value, scale[r], sum[r][t]);
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int t = 0; t < tokens; t++) to[r][(token + t) * stride] = _mm512_reduce_add_ps(sum[r][t]);
}

#define TOKENS(COUNT, BITS, DIGITS, SHARED)                                                                            \
    for (; planes->tokens - token >= COUNT; token += COUNT)                                                            \
        some_rows(to, stride, plan, codes, scales, rooms, token, COUNT, BITS, DIGITS, SHARED);

#define ALL_TOKENS(BITS, DIGITS, SHARED)                                                                               \
    AVX512_TARGET static void rows_##BITS##_##DIGITS##_##SHARED(                                                       \
        float *const *to, int64_t stride, const Plan *plan, const uint8_t *const *codes, const float *const *scales) { \
        const Planes *planes = plan->planes;                                                                           \
        int64_t token = 0;                                                                                             \
        uint8_t rooms[ROWS][LAST_UNITS][VECTOR];                                                                       \
        for (int r = 0; r < ROWS; r++)                                                                                 \
            for (int64_t u = plan->full; u < plan->units; u++) {                                                       \
                int64_t left = plan->row_bytes - u * unit_bytes(BITS);                                                 \
                filled_up(rooms[r][u - plan->full], codes[r] + u * unit_bytes(BITS), smaller(left, unit_bytes(BITS))); \
            }                                                                                                          \
        TOKENS(4, BITS, DIGITS, SHARED)                                                                                \
        TOKENS(2, BITS, DIGITS, SHARED)                                                                                \
        TOKENS(1, BITS, DIGITS, SHARED)                                                                                \
    }
#define ALL_DIGITS(BITS, SHARED) ALL_TOKENS(BITS, 1, SHARED) ALL_TOKENS(BITS, 2, SHARED) ALL_TOKENS(BITS, 3, SHARED)
ALL_DIGITS(2, 0)
ALL_DIGITS(3, 1)
ALL_DIGITS(4, 0)
ALL_DIGITS(8, 0)
ALL_DIGITS(8, 1)

typedef void (*RowsFunction)(float *const *, int64_t, const Plan *, const uint8_t *const *, const float *const *);

#define BY_DIGITS(BITS, SHARED) {rows_##BITS##_1_##SHARED, rows_##BITS##_2_##SHARED, rows_##BITS##_3_##SHARED}

/* shared: whether a unit has one scale; it matters at 8 bits. */
static RowsFunction function_for(int bits, int digits, int shared) {
    static const RowsFunction TABLE[5][3] = {BY_DIGITS(2, 0), BY_DIGITS(3, 1), BY_DIGITS(4, 0), BY_DIGITS(8, 0),
                                             BY_DIGITS(8, 1)};
    return TABLE[bits == 8 ? 3 + shared : bits - 2][digits - 1];
}

/* Groups of the lanes; memory: [units][1 + 16], the lanes first. */
static void find_groups(Plan *plan, int32_t *memory, const UniformMatrix *matrix) {
    int columns = unit_columns(matrix->bits), columns_of_lane = columns / LANES;
    plan->lanes = memory;
    plan->first = memory + plan->units * LANES;
    int64_t group = 0, end = matrix->group_size;
    for (int64_t u = 0; u < plan->units; u++)
        for (int lane = 0; lane < LANES; lane++) {
            int64_t column = u * columns + lane * columns_of_lane;
            if (column >= end && group + 1 < matrix->groups) group++, end += matrix->group_size;
            if (!lane) plan->first[u] = (int32_t)group;
            plan->lanes[u * LANES + lane] = (int32_t)(group - plan->first[u]);
        }
}

int hf_lrq_uniform_avx512(const Planes *planes, const UniformMatrix *matrix, float *to, int64_t stride, int64_t first,
                          int64_t rows) {
    int columns = unit_columns(matrix->bits), size = unit_bytes(matrix->bits);
    int64_t read = matrix->bits == 3 ? 32 : size;
    Plan plan = {.planes = planes,
                 .row_bytes = matrix->row_bytes,
                 .groups = matrix->groups,
                 .units = planes->columns / columns,
                 .full = matrix->row_bytes < read ? 0 : (matrix->row_bytes - read) / size + 1};
    int64_t groups = matrix->groups;
    plan.units_of_scale = matrix->group_size / columns;
    /* A vector of scales is read whole. */
    float *scales = allocate((size_t)(ROWS_OF_SCALES * groups + LANES) * sizeof *scales);
    int32_t *memory = allocate((size_t)(plan.units * (1 + LANES)) * sizeof *memory);
    if (!scales || !memory) {
        free(scales);
        free(memory);
        return -1;
    }
    memset(scales + ROWS_OF_SCALES * groups, 0, LANES * sizeof *scales);
    find_groups(&plan, memory, matrix);
    RowsFunction function = function_for(matrix->bits, planes->digits, matrix->group_size % columns == 0);
    for (int64_t start = 0; start < rows; start += ROWS_OF_SCALES) {
        int64_t count = smaller(ROWS_OF_SCALES, rows - start);
        hf_lrq_to_float(scales, matrix->scales, (first + start) * groups, count * groups, matrix->scales_kind);
        for (int64_t i = 0; i < count; i += ROWS) {
            const uint8_t *codes[ROWS];
            const float *scales_of[ROWS];
            float *results[ROWS];
            for (int r = 0; r < ROWS; r++) { /* the last one again where there is none */
                int64_t row = smaller(i + r, count - 1);
                codes[r] = matrix->codes + (first + start + row) * matrix->row_bytes;
                scales_of[r] = scales + row * groups;
                results[r] = to + start + row;
            }
            function(results, stride, &plan, codes, scales_of);
        }
    }
    free(scales);
    free(memory);
    return 0;
}

#endif
