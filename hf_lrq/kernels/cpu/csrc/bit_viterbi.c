/* Nearest paths through a bit-step trellis, in exact integer arithmetic.

The definition is `bit_viterbi` of codebooks/viterbi.py. State s is 16 bits; it follows the 2^k states
((s << k) & 0xffff) | d, so all 2^k states that differ in their newest bits only share their best predecessor. A
candidate is 2^k * cost + d: one minimum finds both. */

#include <stdatomic.h>

#include "common.h"
#include "pool.h"

#if HF_LRQ_HAS_AVX512
#include <immintrin.h>
#endif

enum { STATES = 1 << 16 };

/* best[g] = least of 2^k * cost + d over the group g; returned in cost and choice. */
ALWAYS_INLINE void choose(int32_t *restrict best, uint8_t *restrict choice, const int32_t *restrict cost, int bits) {
    int groups = STATES >> bits, branches = 1 << bits;
    for (int g = 0; g < groups; g++) {
        int32_t least = cost[g << bits];
        int which = 0;
        for (int d = 1; d < branches; d++) {
            int32_t value = cost[(g << bits) + d];
            which = value < least ? d : which;
            least = value < least ? value : least;
        }
        best[g] = least;
        choice[g] = (uint8_t)which;
    }
}

ALWAYS_INLINE void choose_all_body(int32_t *best, uint8_t *choice, const int32_t *cost, int bits) {
    if (bits == 2)
        choose(best, choice, cost, 2);
    else if (bits == 3)
        choose(best, choice, cost, 3);
    else
        choose(best, choice, cost, 4);
}
HF_LRQ_CLONES(static, choose_all, (int32_t *best, uint8_t *choice, const int32_t *cost, int bits),
              (best, choice, cost, bits))

/* cost[s] = best[s without its newest bits] + half_norms[s] - points[s] * x; the least of all, to `found`. */
ALWAYS_INLINE void extend_body(int32_t *restrict cost, const int32_t *restrict best, const int16_t *restrict points,
                               const int32_t *restrict half_norms, int32_t x, int32_t less, int bits, int32_t *found) {
    int groups = STATES >> bits, least = INT32_MAX;
    for (int newest = 0; newest < 1 << bits; newest++) {
        int first = newest * groups;
        for (int g = 0; g < groups; g++) {
            int32_t value = best[g] - less + half_norms[first + g] - points[first + g] * x;
            cost[first + g] = value;
            least = value < least ? value : least;
        }
    }
    *found = least;
}
HF_LRQ_CLONES(static, extend,
              (int32_t *cost, const int32_t *best, const int16_t *points, const int32_t *half_norms, int32_t x,
               int32_t less, int bits, int32_t *found),
              (cost, best, points, half_norms, x, less, bits, found))

typedef struct {
    const int16_t *points;
    const int32_t *half_norms;
    int bits;
    int32_t *cost, *best; /* [STATES], [STATES >> bits] */
    uint8_t *back;        /* [step][STATES >> bits] */
} Search;

/* Costs far above any that a path can have: a start elsewhere. */
enum { FORBIDDEN = 1 << 29 };

/* `steps` steps from step `first` on, circular; from `start`, or from anywhere if it is negative. */
static void forward(Search *search, const int16_t *x, int length, int first, int steps, int start) {
    for (int s = 0; s < STATES; s++) search->cost[s] = start < 0 || s == start ? 0 : FORBIDDEN;
    int32_t least = 0;
    int groups = STATES >> search->bits;
    for (int t = 0; t < steps; t++) {
        choose_all(search->best, search->back + (size_t)t * groups, search->cost, search->bits);
        /* Costs count from the least one, or they would leave 32 bits. */
        extend(search->cost, search->best, search->points, search->half_norms, x[(first + t) % length], least,
               search->bits, &least);
    }
}

/* The state before step `to` of a path that is in `state` after the last of `steps` steps; symbols of the steps from
   `to` on go to `symbols` if given. */
static int backward(const Search *search, int steps, int to, int state, uint8_t *symbols) {
    int groups = STATES >> search->bits;
    for (int t = steps - 1; t >= to; t--) {
        if (symbols) symbols[t] = (uint8_t)(state >> (16 - search->bits));
        int group = state & (groups - 1);
        state = group << search->bits | search->back[(size_t)t * groups + group];
    }
    return state;
}

#if HF_LRQ_HAS_AVX512
/* Several sequences at once, so that the tables are read once for all. Costs are multiples of 2^bits, and the newest bits
   of a state stand below them: a minimum over states that differ there only is cost and choice in one. They may grow for
   MOST_STEPS steps before they leave 32 bits. */
enum { TOGETHER = 4, MOST_STEPS = 256, FAR = 1 << 28 };

typedef struct {
    int32_t *norms; /* [STATES]: 2^bits * half_norm + newest bits of the next choice */
    int32_t *pairs; /* [STATES]: 2^bits * point, as int16, and 0 */
    int32_t *best[TOGETHER], *next[TOGETHER]; /* [groups]: least cost of a group, choice removed */
    uint8_t *back[TOGETHER];                  /* [step][groups] */
} FastSearch;

/* Minima of the 16 quadruples of lanes of v[0..3]: lane 4 b + i is quadruple b of v[i]. */
AVX512_TARGET ALWAYS_INLINE __m512i quadruples(const __m512i *v) {
    __m512 half[2], low, high;
    UNROLL for (int i = 0; i < 2; i++) {
        __m512 a = _mm512_castsi512_ps(v[2 * i]), b = _mm512_castsi512_ps(v[2 * i + 1]);
        low = _mm512_shuffle_ps(a, b, 0x88);
        high = _mm512_shuffle_ps(a, b, 0xdd);
        half[i] = _mm512_castsi512_ps(_mm512_min_epi32(_mm512_castps_si512(low), _mm512_castps_si512(high)));
    }
    low = _mm512_shuffle_ps(half[0], half[1], 0x88);
    high = _mm512_shuffle_ps(half[0], half[1], 0xdd);
    return _mm512_min_epi32(_mm512_castps_si512(low), _mm512_castps_si512(high));
}

/* Minima of the pairs of quarters of a and b. */
AVX512_TARGET ALWAYS_INLINE __m512i quarters(__m512i a, __m512i b) {
    return _mm512_min_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

/* Minima of the 16 runs of 2^bits lanes of v, in order. */
AVX512_TARGET ALWAYS_INLINE __m512i minima(const __m512i *v, int bits) {
    if (bits == 2) {
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        return _mm512_permutexvar_epi32(order, quadruples(v));
    }
    if (bits == 3) {
        const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        return _mm512_permutexvar_epi32(order, quarters(quadruples(v), quadruples(v + 4)));
    }
    return quarters(quarters(quadruples(v), quadruples(v + 4)), quarters(quadruples(v + 8), quadruples(v + 12)));
}

AVX512_TARGET ALWAYS_INLINE void step_of(FastSearch *f, const int16_t *x, int t, int bits) {
    int groups = STATES >> bits, branches = 1 << bits;
    const __m512i choice = _mm512_set1_epi32(branches - 1);
    __m512i by[TOGETHER];
    UNROLL for (int s = 0; s < TOGETHER; s++) by[s] = _mm512_set1_epi32((uint16_t)-x[s]);
    for (int first = 0; first < STATES; first += 16 * branches) {
        __m512i norms[16], pairs[16]; /* once for all sequences */
        UNROLL for (int i = 0; i < branches; i++) {
            norms[i] = _mm512_load_si512(f->norms + first + 16 * i);
            pairs[i] = _mm512_load_si512(f->pairs + first + 16 * i);
        }
        UNROLL for (int s = 0; s < TOGETHER; s++) {
            const int32_t *best = f->best[s] + (first & (groups - 1));
            __m512i v[16];
            UNROLL for (int i = 0; i < branches; i++) {
                v[i] = _mm512_add_epi32(_mm512_load_si512(best + 16 * i), norms[i]);
                v[i] = _mm512_dpwssd_epi32(v[i], pairs[i], by[s]);
            }
            __m512i least = minima(v, bits);
            int group = first >> bits;
            _mm512_store_si512(f->next[s] + group, _mm512_andnot_si512(choice, least));
            __m128i chosen = _mm512_cvtepi32_epi8(_mm512_and_si512(choice, least));
            _mm_storeu_si128((__m128i *)(f->back[s] + (size_t)t * groups + group), chosen);
        }
    }
    for (int s = 0; s < TOGETHER; s++) {
        int32_t *swap = f->best[s];
        f->best[s] = f->next[s];
        f->next[s] = swap;
    }
}

AVX512_TARGET static void fast_step(FastSearch *f, const int16_t *x, int t, int bits) {
    if (bits == 2)
        step_of(f, x, t, 2);
    else if (bits == 3)
        step_of(f, x, t, 3);
    else
        step_of(f, x, t, 4);
}

/* As `forward` for up to TOGETHER sequences, all but the last step's metric; starts: states, or NULL for anywhere. */
static void fast_forward(FastSearch *f, const int16_t *x, int count, int length, int first, int steps, const int *starts,
                         int bits) {
    int groups = STATES >> bits;
    for (int s = 0; s < TOGETHER; s++) {
        memset(f->back[s], 0, (size_t)groups);
        for (int g = 0; g < groups; g++) f->best[s][g] = starts ? FAR : 0;
        if (starts) {
            f->best[s][starts[s] >> bits] = 0;
            f->back[s][starts[s] >> bits] = (uint8_t)(starts[s] & ((1 << bits) - 1));
        }
    }
    for (int t = 0; t + 1 < steps; t++) {
        int16_t now[TOGETHER] = {0};
        for (int s = 0; s < count; s++) now[s] = x[(int64_t)s * length + (first + t) % length];
        fast_step(f, now, t + 1, bits);
    }
}

/* The first of the cheapest states after the last step, with x. */
static int cheapest(const int32_t *best, const int16_t *points, const int32_t *half_norms, int x, int bits) {
    int groups = STATES >> bits, found = 0;
    int64_t least = INT64_MAX;
    for (int s = 0; s < STATES; s++) {
        int64_t value = (best[s & (groups - 1)] >> bits) + half_norms[s] - points[s] * x;
        if (value < least) least = value, found = s;
    }
    return found;
}
#endif

typedef struct {
    const int16_t *points, *x;
    const int32_t *half_norms;
    int64_t n;
    int steps, bits, window;
    uint8_t *out;
    atomic_int_least64_t next;
    atomic_int failed;
} Work;

#if HF_LRQ_HAS_AVX512
static void fast_work(Work *w) {
    int groups = STATES >> w->bits, steps = w->steps, window = w->window, bits = w->bits;
    FastSearch f;
    size_t back = (size_t)larger(steps, 2 * window) * (size_t)groups;
    f.norms = allocate(2 * STATES * sizeof *f.norms + TOGETHER * (2 * (size_t)groups * sizeof **f.best + back));
    if (!f.norms) {
        atomic_store(&w->failed, 1);
        return;
    }
    f.pairs = f.norms + STATES;
    for (int s = 0; s < STATES; s++) {
        f.norms[s] = w->half_norms[s] * (1 << bits) + (s & ((1 << bits) - 1));
        f.pairs[s] = (uint16_t)(w->points[s] * (1 << bits));
    }
    for (int s = 0; s < TOGETHER; s++) {
        f.best[s] = f.pairs + STATES + 2 * s * groups;
        f.next[s] = f.best[s] + groups;
        f.back[s] = (uint8_t *)(f.pairs + STATES + 2 * TOGETHER * groups) + s * back;
    }
    int64_t first;
    while ((first = atomic_fetch_add(&w->next, TOGETHER)) < w->n) {
        int count = (int)smaller(TOGETHER, w->n - first), seam[TOGETHER] = {0};
        const int16_t *x = w->x + first * steps;
        fast_forward(&f, x, count, steps, steps - window, 2 * window, NULL, bits);
        for (int s = 0; s < count; s++) {
            int state = cheapest(f.best[s], w->points, w->half_norms, x[s * steps + window - 1], bits);
            Search search = {.bits = bits, .back = f.back[s]};
            seam[s] = backward(&search, 2 * window, window, state, NULL);
        }
        fast_forward(&f, x, count, steps, 0, steps, seam, bits);
        for (int s = 0; s < count; s++) {
            Search search = {.bits = bits, .back = f.back[s]};
            backward(&search, steps, 0, seam[s], w->out + (first + s) * steps);
        }
    }
    free(f.norms);
}
#endif

static void work(void *context) {
    Work *w = context;
#if HF_LRQ_HAS_AVX512
    if (hf_lrq_isa() >= HF_LRQ_AVX512 && w->steps <= MOST_STEPS) {
        fast_work(w);
        return;
    }
#endif
    int groups = STATES >> w->bits, steps = w->steps, window = w->window;
    Search search = {.points = w->points, .half_norms = w->half_norms, .bits = w->bits};
    search.cost = allocate(STATES * sizeof *search.cost);
    search.best = allocate((size_t)groups * sizeof *search.best);
    search.back = allocate((size_t)larger(steps, 2 * window) * (size_t)groups);
    if (!search.cost || !search.best || !search.back) atomic_store(&w->failed, 1);
    int64_t i;
    while (!atomic_load(&w->failed) && (i = atomic_fetch_add(&w->next, 1)) < w->n) {
        const int16_t *x = w->x + i * steps;
        forward(&search, x, steps, steps - window, 2 * window, -1);
        int state = 0;
        for (int s = 1; s < STATES; s++)
            if (search.cost[s] < search.cost[state]) state = s;
        int seam = backward(&search, 2 * window, window, state, NULL);
        forward(&search, x, steps, 0, steps, seam);
        backward(&search, steps, 0, seam, w->out + i * steps);
    }
    free(search.cost);
    free(search.best);
    free(search.back);
}

/* x: [n][steps], |x| <= 511; out: [n][steps]. `window` steps on both sides of the seam find its state.
   Returns 0, or -1 if memory ran out. */
HF_LRQ_EXPORT int32_t hf_lrq_bit_viterbi(const int16_t *points, const int32_t *half_norms, const int16_t *x, int64_t n,
                                         int32_t steps, int32_t bits, int32_t window, uint8_t *out, int32_t threads) {
    Work all = {.points = points, .half_norms = half_norms, .x = x, .n = n, .steps = steps, .bits = bits};
    all.window = window;
    all.out = out;
    hf_lrq_run(work, &all, threads);
    return all.failed ? -1 : 0;
}
