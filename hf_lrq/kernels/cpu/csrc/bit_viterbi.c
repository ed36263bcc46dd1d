/* Nearest paths through a bit-step trellis, in exact integer arithmetic.

The definition is `bit_viterbi` of codebooks/viterbi.py. State s is 16 bits; it follows the 2^k states
((s << k) & 0xffff) | d, so all 2^k states that differ in their newest bits only share their best predecessor. A
candidate is 2^k * cost + d: one minimum finds both. */

#include <stdatomic.h>

#include "common.h"
#include "pool.h"

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

typedef struct {
    const int16_t *points, *x;
    const int32_t *half_norms;
    int64_t n;
    int steps, bits, window;
    uint8_t *out;
    atomic_int_least64_t next;
    atomic_int failed;
} Work;

static void work(void *context) {
    Work *w = context;
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
