/* The `int` codebook in 16-bit arithmetic (AVX2): some rows meet the integers of some planes, the sums stay in registers. */

#include "uniform.h"

#include "floats.h"

#if HF_LRQ_HAS_AVX2
#include <immintrin.h>

/* A step takes 16 columns of each vector of a unit, and reads 16 bytes of codes. */
enum { STEP = 16, STEPS = VECTOR / STEP, MOST_ROWS = 4, MOST_PLANES = 4, STRIP = 16, LAST_UNITS = 2 };
/* Bytes that codes are fetched ahead. Without, one token takes up to a half longer. */
enum { AHEAD = 4096 };

/* What is the same for all rows. */
typedef struct {
    const Planes *planes;
    const UniformMatrix *matrix;
    int64_t end;            /* of the rows */
    int64_t units, full;    /* `full` units of a row can be read in place even if no row follows */
    int64_t units_of_x;     /* that share a scale of the activations */
    int64_t steps_of_scale; /* that share a scale of the row: 1, 2 or 4 */
    int32_t *group_of;      /* [units][STEPS] */
} Plan;

/* Some rows and planes. */
typedef struct {
    const uint8_t *codes[MOST_ROWS];
    const float *scales[MOST_ROWS];
    const uint8_t *x[MOST_PLANES];
    const float *scales_of_x[MOST_PLANES];
    float *to[MOST_ROWS]; /* of plane p: `stride` p further on */
    int64_t stride;
    int64_t full; /* units to be read in place; the others are in: */
    uint8_t (*rooms)[LAST_UNITS][VECTOR];
} Block;

/* 16 codes of 3 or 6 bits as odd numbers; 16 bytes are read. Each code comes with the next byte into 16 bits, where it is
   brought to the top. */
AVX2_TARGET ALWAYS_INLINE __m256i packed_numbers(const uint8_t *codes, const int bits) {
    uint8_t places[32];
    int16_t factors[16];
    for (int k = 0; k < 16; k++) {
        int bit = bits * k;
        places[2 * k] = (uint8_t)(bit / 8);
        places[2 * k + 1] = (uint8_t)(bit / 8 + 1);
        factors[k] = (int16_t)(1 << (16 - bits - bit % 8));
    }
    __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
    v = _mm256_shuffle_epi8(v, _mm256_loadu_si256((const __m256i *)places));
    v = _mm256_srli_epi16(_mm256_mullo_epi16(v, _mm256_loadu_si256((const __m256i *)factors)), 15 - bits);
    return _mm256_sub_epi16(_mm256_or_si256(v, _mm256_set1_epi16(1)), _mm256_set1_epi16(1 << bits));
}

/* Odd numbers of a step, [vector]. */
AVX2_TARGET ALWAYS_INLINE void odd_numbers(__m256i *to, const uint8_t *codes, const int bits) {
    if (bits == 3 || bits == 6) {
        to[0] = packed_numbers(codes, bits);
        return;
    }
    const int most = (1 << bits) - 1;
    __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes));
    UNROLL for (int k = 0; k < 8 / bits; k++) {
        __m256i twice = k == 0 ? _mm256_slli_epi16(v, 1) : _mm256_srli_epi16(v, k * bits - 1);
        if (bits < 8) twice = _mm256_and_si256(twice, _mm256_set1_epi16((short)(2 * most)));
        to[k] = _mm256_sub_epi16(twice, _mm256_set1_epi16((short)most));
    }
}

AVX2_TARGET ALWAYS_INLINE float sum_of(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

AVX2_TARGET ALWAYS_INLINE void some_rows(const Plan *plan, const Block *block, const int rows, const int planes,
                                         const int bits) {
    const int vectors = vectors_of_unit(bits), size = unit_bytes(bits);
    const int64_t bytes = hf_lrq_uniform_unit_bytes(plan->planes), flush = plan->steps_of_scale - 1;
    __m256 total[MOST_ROWS][MOST_PLANES];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int p = 0; p < planes; p++) total[i][p] = _mm256_setzero_ps();
    for (int64_t from = 0, part = 0; from < plan->units; from += plan->units_of_x, part++) {
        __m256 sums[MOST_ROWS][MOST_PLANES];
        UNROLL for (int i = 0; i < rows; i++) UNROLL for (int p = 0; p < planes; p++) sums[i][p] = _mm256_setzero_ps();
        for (int64_t u = from; u < smaller(from + plan->units_of_x, plan->units); u++) {
            const int32_t *group_of = plan->group_of + u * STEPS;
            UNROLL for (int i = 0; i < rows; i++) {
                const uint8_t *codes = u < block->full ? block->codes[i] + u * size : block->rooms[i][u - plan->full];
                _mm_prefetch((const char *)(block->codes[i] + u * size + AHEAD), _MM_HINT_T0);
                __m256i whole[MOST_PLANES];
                UNROLL for (int p = 0; p < planes; p++) whole[p] = _mm256_setzero_si256();
                UNROLL for (int s = 0; s < STEPS; s++) {
                    __m256i w[4];
                    odd_numbers(w, codes + s * (size / STEPS), bits);
                    UNROLL for (int p = 0; p < planes; p++)
                        UNROLL for (int v = 0; v < vectors; v++) {
                            const uint8_t *x = block->x[p] + u * bytes + 2 * (v * VECTOR + s * STEP);
                            __m256i products = _mm256_madd_epi16(w[v], _mm256_loadu_si256((const __m256i *)x));
                            whole[p] = _mm256_add_epi32(whole[p], products);
                        }
                    if ((s & flush) != flush) continue;
                    __m256 scale = _mm256_broadcast_ss(block->scales[i] + group_of[s]);
                    UNROLL for (int p = 0; p < planes; p++) {
                        sums[i][p] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[p]), scale, sums[i][p]);
                        whole[p] = _mm256_setzero_si256();
                    }
                }
            }
        }
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int p = 0; p < planes; p++)
                total[i][p] = _mm256_fmadd_ps(sums[i][p], _mm256_set1_ps(block->scales_of_x[p][part]), total[i][p]);
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int p = 0; p < planes; p++) block->to[i][p * block->stride] = sum_of(total[i][p]);
}

#define SOME_ROWS(BITS)                                                                                                \
    AVX2_TARGET static void rows_##BITS##_1(const Plan *plan, const Block *block) { some_rows(plan, block, 4, 1, BITS); } \
    AVX2_TARGET static void rows_##BITS##_2(const Plan *plan, const Block *block) { some_rows(plan, block, 4, 2, BITS); } \
    AVX2_TARGET static void rows_##BITS##_4(const Plan *plan, const Block *block) { some_rows(plan, block, 2, 4, BITS); }
SOME_ROWS(2)
SOME_ROWS(3)
SOME_ROWS(4)
SOME_ROWS(6)
SOME_ROWS(8)

typedef struct {
    int bits;
    void (*of[3])(const Plan *, const Block *); /* of 1, 2 and 4 planes */
} Functions;

#define BY_PLANES(BITS) {BITS, {rows_##BITS##_1, rows_##BITS##_2, rows_##BITS##_4}}
static const Functions FUNCTIONS[] = {BY_PLANES(2), BY_PLANES(3), BY_PLANES(4), BY_PLANES(6), BY_PLANES(8)};

static void find_groups(const Plan *plan) {
    const UniformMatrix *matrix = plan->matrix;
    int64_t columns = unit_columns(matrix->bits) / STEPS;
    for (int64_t i = 0; i < plan->units * STEPS; i++)
        plan->group_of[i] = (int32_t)smaller(i * columns / matrix->group_size, matrix->groups - 1);
}

static void set_planes(Block *block, const Plan *plan, int64_t first, int64_t count) {
    static const float one = 1;
    const Planes *planes = plan->planes;
    int64_t bytes = hf_lrq_uniform_unit_bytes(planes);
    for (int64_t p = 0; p < count; p++) {
        int64_t token = (first + p) / planes->token_planes, plane = (first + p) % planes->token_planes;
        block->x[p] = planes->x + token * plan->units * bytes + 2 * plane * unit_columns(plan->matrix->bits);
        block->scales_of_x[p] = planes->blocks ? planes->scales + token * hf_lrq_scales_of_token(planes) : &one;
    }
}

/* `count` rows from `row` on, the last one again where there are fewer before `stop`. scales, to: of row `start`. */
static void set_rows(Block *block, const Plan *plan, int64_t row, int64_t count, int64_t start, int64_t stop,
                     const float *scales, float *to) {
    const UniformMatrix *matrix = plan->matrix;
    int64_t size = unit_bytes(matrix->bits), last = smaller(row + count, stop) - 1;
    block->full = (plan->end - 1 - last) * matrix->row_bytes >= VECTOR ? plan->units : plan->full;
    for (int64_t i = 0; i < count; i++) {
        int64_t at = smaller(row + i, last);
        block->codes[i] = matrix->codes + at * matrix->row_bytes;
        block->scales[i] = scales + (at - start) * matrix->groups;
        block->to[i] = to + (at - start);
        for (int64_t u = block->full; u < plan->units; u++)
            filled_up(block->rooms[i][u - plan->full], block->codes[i] + u * size,
                      smaller(matrix->row_bytes - u * size, size));
    }
}

/* Rows [start, stop), a strip at most; planes: [planes][STRIP]. */
static void strip(const Plan *plan, const float *scales, int64_t start, int64_t stop, float *sums) {
    uint8_t rooms[MOST_ROWS][LAST_UNITS][VECTOR];
    Block block = {.stride = STRIP, .rooms = rooms};
    int64_t all = plan->planes->tokens * plan->planes->token_planes;
    const Functions *functions = FUNCTIONS;
    while (functions->bits != plan->matrix->bits) functions++;
    for (int64_t plane = 0, count; plane < all; plane += count) {
        int which = all - plane >= 4 ? 2 : all - plane >= 2 ? 1 : 0;
        int64_t rows = which == 2 ? 2 : 4;
        count = (int64_t)1 << which;
        set_planes(&block, plan, plane, count);
        for (int64_t row = start; row < stop; row += rows) {
            set_rows(&block, plan, row, rows, start, stop, scales, sums + plane * STRIP);
            functions->of[which](plan, &block);
        }
    }
}

/* Planes of the tokens, put together. */
static void finish(const Planes *planes, float *to, int64_t stride, const float *sums, int64_t rows) {
    for (int64_t token = 0; token < planes->tokens; token++, to += stride, sums += planes->token_planes * STRIP)
        for (int64_t i = 0; i < rows; i++) {
            to[i] = sums[i];
            for (int k = 1; k < planes->token_planes; k++) to[i] += planes->factor[k] * sums[k * STRIP + i];
        }
}

int hf_lrq_uniform_avx2(const Planes *planes, const UniformMatrix *matrix, float *to, int64_t stride, int64_t first,
                        int64_t rows) {
    int columns = unit_columns(matrix->bits), size = unit_bytes(matrix->bits), read = size - size / STEPS + STEP;
    int64_t run = hf_lrq_uniform_run(matrix), groups = matrix->groups, end = first + rows;
    if (run * STEPS < columns) return hf_lrq_uniform_portable(planes, matrix, to, stride, first, rows);
    Plan plan = {.planes = planes,
                 .matrix = matrix,
                 .end = end,
                 .units = planes->columns / columns,
                 .full = matrix->row_bytes < read ? 0 : (matrix->row_bytes - read) / size + 1,
                 .units_of_x = planes->blocks ? SCALE_COLUMNS / columns : planes->columns / columns,
                 .steps_of_scale = run * STEPS / columns};
    plan.group_of = allocate((size_t)(plan.units * STEPS) * sizeof *plan.group_of);
    float *scales = allocate((size_t)(STRIP * groups) * sizeof *scales);
    float *sums = allocate((size_t)(STRIP * planes->tokens * planes->token_planes) * sizeof *sums);
    int failed = !plan.group_of || !scales || !sums;
    if (!failed) find_groups(&plan);
    for (int64_t start = first, count; !failed && start < end; start += count, to += count) {
        count = smaller(STRIP, end - start);
        hf_lrq_to_float(scales, matrix->scales, start * groups, count * groups, matrix->scales_kind);
        strip(&plan, scales, start, start + count, sums);
        finish(planes, to, stride, sums, count);
    }
    free(plan.group_of);
    free(scales);
    free(sums);
    return failed ? -1 : 0;
}

#endif
