/* Nearest paths through a byte-step trellis, in exact integer arithmetic.

The definition is `viterbi` of codebooks/viterbi.py; every path below returns its bytes, ties included. A candidate is
one 32-bit number, 256 * metric + predecessor, so that one minimum finds both. */

#include <stdatomic.h>

#include "common.h"
#include "pool.h"

#if HF_LRQ_HAS_AVX2
#include <immintrin.h>
#endif

enum { STATES = 256, LANES = 16, BLOCKS = STATES / LANES, BATCH = 8, SCALE_Y = 8, SCALE_X = 32 };

/* Words per lane of a table: 256 * half the squared norm + predecessor, then `pairs` words of two int16 each. */
static inline int words_of(int width) { return 1 + width / 2; }

HF_LRQ_EXPORT int64_t hf_lrq_viterbi_table_words(int32_t width) { return (int64_t)BLOCKS * STATES * words_of(width) * LANES; }

/* points: [256 previous][256 current][width]; half_norms: [256][256]. */
HF_LRQ_EXPORT void hf_lrq_viterbi_table(const int16_t *points, const int32_t *half_norms, int32_t width, int32_t *table) {
    int words = words_of(width);
    for (int block = 0; block < BLOCKS; block++)
        for (int p = 0; p < STATES; p++) {
            int32_t *entry = table + ((int64_t)block * STATES + p) * words * LANES;
            for (int lane = 0; lane < LANES; lane++) {
                int64_t state = (int64_t)p * STATES + block * LANES + lane;
                entry[lane] = half_norms[state] * 256 + p;
                for (int k = 0; k < width / 2; k++) {
                    uint16_t low = (uint16_t)(points[state * width + 2 * k] * SCALE_Y);
                    uint16_t high = (uint16_t)(points[state * width + 2 * k + 1] * SCALE_Y);
                    entry[(1 + k) * LANES + lane] = (int32_t)(low | (uint32_t)high << 16);
                }
            }
        }
}

typedef struct {
    int32_t cost[BATCH][STATES]; /* multiples of 256, the least is 0 */
    int32_t best[BATCH][STATES];
    int32_t x[BATCH][2]; /* pairs of int16: -32 x */
} Batch;

typedef void (*StepFunction)(Batch *, const int32_t *table, int width);

static inline int32_t pair_product(int32_t a, int32_t b) {
    return (int32_t)(int16_t)(a & 0xffff) * (int16_t)(b & 0xffff) + (a >> 16) * (b >> 16);
}

static void step_portable(Batch *batch, const int32_t *table, int width) {
    int words = words_of(width);
    for (int s = 0; s < BATCH; s++)
        for (int block = 0; block < BLOCKS; block++) {
            int32_t *best = batch->best[s] + block * LANES;
            for (int lane = 0; lane < LANES; lane++) best[lane] = INT32_MAX;
            for (int p = 0; p < STATES; p++) {
                const int32_t *entry = table + ((int64_t)block * STATES + p) * words * LANES;
                for (int lane = 0; lane < LANES; lane++) {
                    int32_t value = entry[lane] + batch->cost[s][p];
                    for (int k = 0; k < width / 2; k++) value += pair_product(entry[(1 + k) * LANES + lane], batch->x[s][k]);
                    if (value < best[lane]) best[lane] = value;
                }
            }
        }
}

#if HF_LRQ_HAS_AVX512
#define STEP_AVX512(NAME, WIDTH)                                                                                       \
    HF_LRQ_TARGET("avx512f,avx512bw,avx512vl,avx512vnni")                                                              \
    static void NAME(Batch *batch, const int32_t *table, int width) {                                                  \
        enum { WORDS = 1 + WIDTH / 2 };                                                                                \
        __m512i x[BATCH][2];                                                                                           \
        (void)width;                                                                                                   \
        for (int s = 0; s < BATCH; s++)                                                                                \
            for (int k = 0; k < WIDTH / 2; k++) x[s][k] = _mm512_set1_epi32(batch->x[s][k]);                           \
        for (int block = 0; block < BLOCKS; block++) {                                                                 \
            const int32_t *entry = table + (int64_t)block * STATES * WORDS * LANES;                                    \
            __m512i best[BATCH];                                                                                       \
            for (int s = 0; s < BATCH; s++) best[s] = _mm512_set1_epi32(INT32_MAX);                                    \
            for (int p = 0; p < STATES; p++, entry += WORDS * LANES) {                                                 \
                __m512i norms = _mm512_loadu_si512(entry), y0 = _mm512_loadu_si512(entry + LANES), y1 = y0;            \
                if (WIDTH == 4) y1 = _mm512_loadu_si512(entry + 2 * LANES);                                            \
                _Pragma("GCC unroll 8") for (int s = 0; s < BATCH; s++) {                                              \
                    __m512i value = _mm512_add_epi32(norms, _mm512_set1_epi32(batch->cost[s][p]));                     \
                    value = _mm512_dpwssd_epi32(value, y0, x[s][0]);                                                   \
                    if (WIDTH == 4) value = _mm512_dpwssd_epi32(value, y1, x[s][1]);                                   \
                    best[s] = _mm512_min_epi32(best[s], value);                                                        \
                }                                                                                                      \
            }                                                                                                          \
            for (int s = 0; s < BATCH; s++) _mm512_storeu_si512(batch->best[s] + block * LANES, best[s]);              \
        }                                                                                                              \
    }
STEP_AVX512(step2_avx512, 2)
STEP_AVX512(step4_avx512, 4)
#endif

#if HF_LRQ_HAS_AVX2
#define STEP_AVX2(NAME, WIDTH)                                                                                         \
    HF_LRQ_TARGET("avx2")                                                                                              \
    static void NAME(Batch *batch, const int32_t *table, int width) {                                                  \
        enum { WORDS = 1 + WIDTH / 2, HALF = BATCH / 2 };                                                              \
        (void)width;                                                                                                   \
        for (int first = 0; first < BATCH; first += HALF)                                                              \
            for (int block = 0; block < 2 * BLOCKS; block++) {                                                         \
                const int32_t *entry = table + (int64_t)(block / 2) * STATES * WORDS * LANES + block % 2 * 8;          \
                __m256i best[HALF];                                                                                    \
                for (int s = 0; s < HALF; s++) best[s] = _mm256_set1_epi32(INT32_MAX);                                 \
                for (int p = 0; p < STATES; p++, entry += WORDS * LANES) {                                             \
                    __m256i norms = _mm256_loadu_si256((const __m256i *)entry);                                        \
                    __m256i y0 = _mm256_loadu_si256((const __m256i *)(entry + LANES)), y1 = y0;                        \
                    if (WIDTH == 4) y1 = _mm256_loadu_si256((const __m256i *)(entry + 2 * LANES));                     \
                    _Pragma("GCC unroll 4") for (int s = 0; s < HALF; s++) {                                           \
                        const Batch *b = batch;                                                                        \
                        __m256i value = _mm256_add_epi32(norms, _mm256_set1_epi32(b->cost[first + s][p]));             \
                        __m256i product = _mm256_madd_epi16(y0, _mm256_set1_epi32(b->x[first + s][0]));                \
                        value = _mm256_add_epi32(value, product);                                                      \
                        if (WIDTH == 4) {                                                                              \
                            product = _mm256_madd_epi16(y1, _mm256_set1_epi32(b->x[first + s][1]));                    \
                            value = _mm256_add_epi32(value, product);                                                  \
                        }                                                                                              \
                        best[s] = _mm256_min_epi32(best[s], value);                                                    \
                    }                                                                                                  \
                }                                                                                                      \
                for (int s = 0; s < HALF; s++)                                                                         \
                    _mm256_storeu_si256((__m256i *)(batch->best[first + s] + block * 8), best[s]);                     \
            }                                                                                                          \
    }
STEP_AVX2(step2_avx2, 2)
STEP_AVX2(step4_avx2, 4)
#endif

static StepFunction step_for(int width) {
#if HF_LRQ_HAS_AVX512
    if (hf_lrq_isa() >= HF_LRQ_AVX512) return width == 4 ? step4_avx512 : step2_avx512;
#endif
#if HF_LRQ_HAS_AVX2
    if (hf_lrq_isa() >= HF_LRQ_AVX2) return width == 4 ? step4_avx2 : step2_avx2;
#endif
    (void)width;
    return step_portable;
}

/* The first step of a path that comes from one known state; costs of all current states. */
static void step_from(Batch *batch, const int32_t *table, int width, int s, int p) {
    int words = words_of(width);
    for (int block = 0; block < BLOCKS; block++) {
        const int32_t *entry = table + ((int64_t)block * STATES + p) * words * LANES;
        for (int lane = 0; lane < LANES; lane++) {
            int32_t value = entry[lane];
            for (int k = 0; k < width / 2; k++) value += pair_product(entry[(1 + k) * LANES + lane], batch->x[s][k]);
            batch->best[s][block * LANES + lane] = value;
        }
    }
}

static void finish_step(Batch *batch, uint8_t *back) { /* back: [BATCH][STATES] of this step */
    for (int s = 0; s < BATCH; s++) {
        int32_t least = INT32_MAX;
        for (int c = 0; c < STATES; c++) {
            int32_t value = batch->best[s][c];
            back[s * STATES + c] = (uint8_t)(value & 255);
            value &= ~255;
            batch->cost[s][c] = value;
            if (value < least) least = value;
        }
        for (int c = 0; c < STATES; c++) batch->cost[s][c] -= least;
    }
}

static void load_step(Batch *batch, const int16_t *x, int count, int steps, int width, int t) {
    for (int s = 0; s < BATCH; s++)
        for (int k = 0; k < width / 2; k++) {
            int32_t pair = 0;
            if (s < count) {
                const int16_t *at = x + ((int64_t)s * steps + t) * width + 2 * k;
                pair = (int32_t)((uint16_t)(-SCALE_X * at[0]) | (uint32_t)(uint16_t)(-SCALE_X * at[1]) << 16);
            }
            batch->x[s][k] = pair;
        }
}

/* The paths of n sequences, see below. */
static int search(const int32_t *table, const int16_t *x, int64_t n, int steps, int width, int window, uint8_t *out) {
    StepFunction step = step_for(width);
    Batch *batch = malloc(sizeof *batch);
    uint8_t *back = malloc((size_t)(steps > 2 * window ? steps : 2 * window) * BATCH * STATES);
    if (!batch || !back) {
        free(batch);
        free(back);
        return -1;
    }
    for (int64_t first = 0; first < n; first += BATCH) {
        int count = n - first < BATCH ? (int)(n - first) : BATCH, seam[BATCH];
        const int16_t *here = x + first * steps * width;
        memset(batch->cost, 0, sizeof batch->cost);
        for (int i = 0; i < 2 * window; i++) {
            load_step(batch, here, count, steps, width, (i + steps - window) % steps);
            step(batch, table, width);
            finish_step(batch, back + (size_t)i * BATCH * STATES);
        }
        for (int s = 0; s < count; s++) {
            int state = 0;
            for (int c = 1; c < STATES; c++)
                if (batch->cost[s][c] < batch->cost[s][state]) state = c;
            for (int i = 2 * window - 1; i >= window; i--) state = back[((size_t)i * BATCH + s) * STATES + state];
            seam[s] = state;
        }
        for (int t = 0; t < steps; t++) {
            load_step(batch, here, count, steps, width, t);
            if (t)
                step(batch, table, width);
            else
                for (int s = 0; s < BATCH; s++) step_from(batch, table, width, s, s < count ? seam[s] : 0);
            finish_step(batch, back + (size_t)t * BATCH * STATES);
        }
        for (int s = 0; s < count; s++) {
            int state = seam[s];
            for (int t = steps - 1; t >= 0; t--) {
                out[(first + s) * steps + t] = (uint8_t)state;
                state = back[((size_t)t * BATCH + s) * STATES + state];
            }
        }
    }
    free(batch);
    free(back);
    return 0;
}

enum { SEQUENCES_OF_A_PART = 8 * BATCH };

typedef struct {
    const int32_t *table;
    const int16_t *x;
    int64_t n;
    int steps, width, window;
    uint8_t *out;
    atomic_int_least64_t next;
    atomic_int failed;
} Work;

static void work(void *context) {
    Work *w = context;
    for (;;) {
        int64_t first = atomic_fetch_add(&w->next, SEQUENCES_OF_A_PART);
        if (first >= w->n || atomic_load(&w->failed)) return;
        if (search(w->table, w->x + first * w->steps * w->width, smaller(SEQUENCES_OF_A_PART, w->n - first), w->steps,
                   w->width, w->window, w->out + first * w->steps))
            atomic_store(&w->failed, 1);
    }
}

/* x: [n][steps][width], |x| <= 511; out: [n][steps]. `window` steps on both sides of the seam find its state.
   Returns 0, or -1 if memory ran out. */
HF_LRQ_EXPORT int32_t hf_lrq_viterbi(const int32_t *table, const int16_t *x, int64_t n, int32_t steps, int32_t width,
                                     int32_t window, uint8_t *out, int32_t threads) {
    Work all = {.table = table, .x = x, .n = n, .steps = steps, .width = width, .window = window, .out = out};
    hf_lrq_run(work, &all, threads);
    return all.failed ? -1 : 0;
}
