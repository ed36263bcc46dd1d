/* Nearest points of lattice codebooks, in exact integer arithmetic.

The definition is codebooks/nearest.py: inputs in units of 2^-24, all sums below 2^53, candidates in a fixed order. So
every tier returns the codes of torch, whatever order or width its sums have. */

#include <stdatomic.h>

#include "common.h"
#include "pool.h"

enum { DIM = 8, LANES = 16, FRACTION = 24, KINDS = 8, FULL_ROWS = 227, ROWS = 256 };

/* Kinds of rows: so many 3/2 and 5/2 stand first, descending. */
static const int THREES[KINDS] = {0, 1, 2, 3, 4, 0, 1, 5}, FIVES[KINDS] = {0, 0, 0, 0, 0, 1, 1, 0};

typedef int64_t Lanes[LANES];

typedef struct {
    Lanes x[DIM];
    Lanes order[2][DIM];        /* 8 |x - shift| + coordinate, descending */
    Lanes score[KINDS][2];      /* of the candidate of each kind */
    Lanes signs[2], odd[2];     /* bit i: coordinate i is negative; whether such bits are odd in number */
    Lanes full_score, full;     /* best candidate of the kinds that exist in full: 2 kind + shift */
    Lanes best_score, best;     /* best candidate of all */
} Batch;

/* x [count][8] in units of 2^-24; rounded to the nearest, ties to even. */
ALWAYS_INLINE void load_fixed(Lanes *to, const float *x, int count) {
    /* Adding 1.5 * 2^52 leaves no place for a fraction: the low bits of the sum are the rounded number. */
    const double magic = 0x1.8p52, most = 0x1p46;
    int64_t magic_bits, flat[LANES * DIM];
    memcpy(&magic_bits, &magic, 8);
    for (int i = 0; i < count * DIM; i++) {
        double value = (double)x[i] * 0x1p24;
        value = value == value ? value : 0;
        value = value > most ? most : value;
        value = value < -most ? -most : value;
        value += magic;
        int64_t bits;
        memcpy(&bits, &value, 8);
        flat[i] = bits - magic_bits;
    }
    for (int i = count * DIM; i < LANES * DIM; i++) flat[i] = 0;
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < DIM; i++) to[i][l] = flat[l * DIM + i];
}

ALWAYS_INLINE void exchange(int64_t *larger, int64_t *lesser) {
    for (int l = 0; l < LANES; l++) {
        int64_t a = larger[l], b = lesser[l];
        larger[l] = a > b ? a : b;
        lesser[l] = a > b ? b : a;
    }
}

/* Batcher's odd-even merging network. */
ALWAYS_INLINE void sort_descending(Lanes *v) {
    static const int8_t PAIRS[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                        {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
    UNROLL for (int k = 0; k < 19; k++) exchange(v[PAIRS[k][0]], v[PAIRS[k][1]]);
}

/* Everything about one shift: +1/4 for s = 0, else -1/4. */
ALWAYS_INLINE void fold(Batch *b, int s) {
    const int64_t quarter = (int64_t)1 << (FRACTION - 2), shift = s ? -quarter : quarter;
    Lanes total, m[DIM], even, odd;
    memset(b->signs[s], 0, sizeof(Lanes));
    memset(total, 0, sizeof total);
    for (int i = 0; i < DIM; i++)
        for (int l = 0; l < LANES; l++) {
            int64_t y = b->x[i][l] - shift, negative = y < 0;
            b->signs[s][l] |= negative << i;
            b->order[s][i][l] = (negative ? -y : y) << 3 | i;
            total[l] += b->x[i][l];
        }
    sort_descending(b->order[s]);
    for (int i = 0; i < DIM; i++)
        for (int l = 0; l < LANES; l++) m[i][l] = (int64_t)((uint64_t)b->order[s][i][l] >> 3);
    for (int l = 0; l < LANES; l++) {
        int64_t parity = b->signs[s][l];
        parity ^= parity >> 4;
        parity ^= parity >> 2;
        b->odd[s][l] = (parity ^ parity >> 1) & 1;
        int64_t last = b->odd[s][l] ? -m[7][l] : m[7][l];
        int64_t others = m[0][l] + m[1][l] + m[2][l] + m[3][l] + m[4][l] + m[5][l] + m[6][l];
        int64_t shifted = s ? -total[l] : total[l];
        even[l] = 2 * (others + last) + shifted;
        odd[l] = 2 * (others - last) + shifted;
    }
    for (int kind = 0; kind < KINDS; kind++) {
        int threes = THREES[kind], fives = FIVES[kind];
        const int64_t *all = threes & 1 ? odd : even, half_norm = (int64_t)(2 + 2 * threes + 6 * fives) << (FRACTION + 1);
        for (int l = 0; l < LANES; l++) {
            int64_t score = all[l] - half_norm;
            for (int i = 0; i < threes + fives; i++) score += m[i][l] << (i < fives ? 3 : 2);
            b->score[kind][s][l] = score;
        }
    }
}

ALWAYS_INLINE void choose(Batch *b) {
    for (int l = 0; l < LANES; l++) {
        b->best_score[l] = b->score[0][0][l];
        b->best[l] = 0;
    }
    for (int which = 1; which < 2 * KINDS; which++) {
        if (which == 2 * KINDS - 2) {
            memcpy(b->full_score, b->best_score, sizeof(Lanes));
            memcpy(b->full, b->best, sizeof(Lanes));
        }
        for (int l = 0; l < LANES; l++) {
            int64_t score = b->score[which >> 1][which & 1][l];
            int better = score > b->best_score[l];
            b->best_score[l] = better ? score : b->best_score[l];
            b->best[l] = better ? which : b->best[l];
        }
    }
}

typedef struct {
    const uint8_t *rows;       /* [256][8]: 0, 1, 2 for 1/2, 3/2, 5/2 */
    const int16_t *row_of_key; /* -1: there is none */
} Book;

static int64_t join(int64_t row, int64_t shift, int64_t signs) { return row << 8 | shift << 7 | (signs & 127); }

/* The code of a candidate, or a negative number where its row is absent. */
static int64_t code_of(const Batch *b, const Book *book, int l, int64_t which) {
    int kind = (int)(which >> 1), shift = (int)(which & 1), key = 0;
    for (int i = 0; i < THREES[kind] + FIVES[kind]; i++)
        key |= (i < FIVES[kind] ? 2 : 1) << 2 * (b->order[shift][i][l] & 7);
    int64_t row = book->row_of_key[key], wrong = b->odd[shift][l] ^ (THREES[kind] & 1);
    return row < 0 ? row : join(row, shift, b->signs[shift][l] ^ wrong << (b->order[shift][7][l] & 7));
}

/* The best of the rows of the last kind, which are tried one by one, or the best of the other kinds. */
static int64_t code_by_rows(const Batch *b, const Book *book, int l) {
    const int64_t quarter = (int64_t)1 << (FRACTION - 2);
    int64_t best = INT64_MIN, magnitude[2][DIM], shifted[2], total = 0, code = 0, half_norm = 0;
    for (int i = 0; i < DIM; i++) {
        int64_t x = b->x[i][l], digit = 2 * book->rows[FULL_ROWS * DIM + i] + 1;
        magnitude[0][i] = x < quarter ? quarter - x : x - quarter;
        magnitude[1][i] = x < -quarter ? -quarter - x : x + quarter;
        total += x;
        half_norm += digit * digit << (FRACTION - 1);
    }
    shifted[0] = total;
    shifted[1] = -total;
    for (int row = FULL_ROWS; row < ROWS; row++)
        for (int s = 0; s < 2; s++) {
            int64_t score = shifted[s] - half_norm, cheapest = INT64_MAX;
            int flip = 0;
            for (int i = 0; i < DIM; i++) {
                int64_t product = (4 * book->rows[row * DIM + i] + 2) * magnitude[s][i];
                score += product;
                flip = product < cheapest ? i : flip;
                cheapest = product < cheapest ? product : cheapest;
            }
            /* The sum of these rows is odd, so it takes an odd number of negative coordinates. */
            int64_t wrong = 1 - b->odd[s][l];
            score -= 2 * wrong * cheapest;
            if (score > best) {
                best = score;
                code = join(row, s, b->signs[s][l] ^ wrong << flip);
            }
        }
    return best > b->full_score[l] ? code : code_of(b, book, l, b->full[l]);
}

ALWAYS_INLINE void search_body(Batch *b, const float *x, int count) {
    load_fixed(b->x, x, count);
    ROLLED for (int s = 0; s < 2; s++) fold(b, s);
    choose(b);
}

HF_LRQ_CLONES(static, search, (Batch *b, const float *x, int count), (b, x, count))

static void e8p_part(const void *context, const float *x, int64_t n, int64_t *out) {
    const Book *book = context;
    Batch batch;
    for (int64_t at = 0; at < n; at += LANES) {
        int count = (int)smaller(LANES, n - at);
        search(&batch, x + at * DIM, count);
        for (int l = 0; l < count; l++) {
            int64_t code = code_of(&batch, book, l, batch.best[l]);
            out[at + l] = code < 0 ? code_by_rows(&batch, book, l) : code;
        }
    }
}

typedef struct {
    const double *points; /* [count][8] */
    const double *biases; /* [count]: -2^24 |point|^2 / 2 */
    int64_t count;
} Points;

/* Vectors are spelled out: compilers do not find them where each of many candidates may be the best. */
enum { WIDE = 4 };
typedef double Doubles __attribute__((vector_size(8 * WIDE), aligned(8)));
typedef int64_t Integers __attribute__((vector_size(8 * WIDE), aligned(8)));

/* Index of the nearest of `count` points, the first of equals; double precision is exact here. */
ALWAYS_INLINE void try_all_body(Lanes best, const Lanes *fixed, const Points *all) {
    for (int first = 0; first < LANES; first += WIDE) {
        Doubles x[DIM], score;
        Integers found;
        for (int l = 0; l < WIDE; l++) {
            for (int i = 0; i < DIM; i++) x[i][l] = (double)fixed[i][first + l];
            score[l] = -0x1p60;
            found[l] = 0;
        }
        for (int64_t k = 0; k < all->count; k++) {
            const double *point = all->points + k * DIM;
            Doubles sum = all->biases[k] + x[0] * point[0];
            UNROLL for (int i = 1; i < DIM; i++) sum += x[i] * point[i];
            Integers better = sum > score, kept;
            kept = ((Integers)sum & better) | ((Integers)score & ~better);
            score = (Doubles)kept;
            found = (k & better) | (found & ~better);
        }
        memcpy(best + first, &found, sizeof found);
    }
}

HF_LRQ_CLONES(static, try_all, (Lanes best, const Lanes *fixed, const Points *all), (best, fixed, all))

static void point_part(const void *context, const float *x, int64_t n, int64_t *out) {
    Lanes fixed[DIM], best;
    for (int64_t at = 0; at < n; at += LANES) {
        int count = (int)smaller(LANES, n - at);
        load_fixed(fixed, x + at * DIM, count);
        try_all(best, fixed, context);
        memcpy(out + at, best, count * sizeof *out);
    }
}

enum { VECTORS_OF_A_PART = 1024 };

typedef struct {
    void (*part)(const void *, const float *, int64_t, int64_t *);
    const void *context;
    const float *x;
    int64_t n, *out;
    atomic_int_least64_t next;
} Work;

static void work(void *context) {
    Work *w = context;
    for (;;) {
        int64_t first = atomic_fetch_add(&w->next, VECTORS_OF_A_PART);
        if (first >= w->n) return;
        w->part(w->context, w->x + first * DIM, smaller(VECTORS_OF_A_PART, w->n - first), w->out + first);
    }
}

/* Codes [n] of the nearest points of E8P to x [n][8]. */
HF_LRQ_EXPORT void hf_lrq_nearest_e8p(const uint8_t *rows, const int16_t *row_of_key, const float *x, int64_t n,
                                      int64_t *out, int32_t threads) {
    Book book = {rows, row_of_key};
    Work all = {.part = e8p_part, .context = &book, .x = x, .n = n, .out = out};
    hf_lrq_run(work, &all, threads);
}

/* Index of the nearest of points [count][8] to x [n][8]; biases [count]: -2^24 |point|^2 / 2. */
HF_LRQ_EXPORT void hf_lrq_nearest_point(const double *points, const double *biases, int64_t count, const float *x,
                                        int64_t n, int64_t *out, int32_t threads) {
    Points given = {points, biases, count};
    Work all = {.part = point_part, .context = &given, .x = x, .n = n, .out = out};
    hf_lrq_run(work, &all, threads);
}
