/* One compressed linear layer in one call: y = rot_out * H_out(scales * (Q z) + L (R z)) + bias, z = H_in(rot_in * x). */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>

#include "activations.h"
#include "floats.h"
#include "pool.h"

/* As Python packs it: 64-bit integers, then a double. Kinds are those of `floats.h`; pointers may be 0 where a tensor may
   be absent. */
typedef struct {
    int64_t x, x_stride, x_kind, y; /* x: [tokens] rows x_stride values apart; y: [tokens][out], of the same kind */
    int64_t tokens, in_features, out_features;
    int64_t codes, family, bits, multipliers[2];
    int64_t scales, scales_kind;
    int64_t rot_in, rot_in_kind, block_in, rot_out, rot_out_kind, block_out;
    int64_t L, L_kind, L_scale, L_scale_kind, R, R_kind, R_scale, R_scale_kind, rank;
    int64_t bias, bias_kind;
    int64_t digits, blocks; /* of the activations, see `Planes` */
    int64_t threads;
    double gain;
} Call;

HF_LRQ_EXPORT int64_t hf_lrq_call_size(void) { return sizeof(Call); }

enum { TOKENS_AT_A_TIME = 32, RANKS_OF_A_PART = 8, LOW_RANK_PAD = 16 };

/* Parts of the work, in the order in which they are handed out: prepare a token; some rows of R z; some rows of y.
   Each stage needs the one before whole. */
enum { PREPARE, LOW_RANK, ROWS, STAGES };

typedef struct {
    const Call *call;
    Kernel kernel;
    uint32_t multipliers[2];
    int64_t first_token, tokens, padded_in, padded_rank;
    int64_t rows_of_part; /* of y: whole Hadamard blocks and whole tiles */
    Planes planes;
    float *z; /* [tokens][padded_in] */
    float *t; /* [tokens][padded_rank]: R z, times both scales */
    int64_t parts[STAGES];
    atomic_int_least64_t next, done[STAGES];
    atomic_int failed;
    pthread_mutex_t lock;
    pthread_cond_t whole;
} Run;

#define POINTER(field) ((const void *)(intptr_t)(field))

ALWAYS_INLINE void multiply_body(float *restrict v, const float *restrict by, int64_t n) {
    for (int64_t i = 0; i < n; i++) v[i] *= by[i];
}
HF_LRQ_CLONES(static, multiply, (float *v, const float *by, int64_t n), (v, by, n))

ALWAYS_INLINE void add_body(float *restrict v, const float *restrict w, int64_t n) {
    for (int64_t i = 0; i < n; i++) v[i] += w[i];
}
HF_LRQ_CLONES(static, add, (float *v, const float *w, int64_t n), (v, w, n))

/* n: multiple of 16. */
ALWAYS_INLINE void inner_product_body(float *found, const float *restrict a, const float *restrict b, int64_t n) {
    float sum[16] = {0};
    for (int64_t i = 0; i < n; i += 16)
        for (int k = 0; k < 16; k++) sum[k] += a[i + k] * b[i + k];
    for (int h = 8; h; h /= 2)
        for (int k = 0; k < h; k++) sum[k] += sum[k + h];
    *found = sum[0];
}
HF_LRQ_CLONES(static, inner_product, (float *found, const float *a, const float *b, int64_t n), (found, a, b, n))

ALWAYS_INLINE void collect_body(float *restrict to, const int32_t *restrict sums, uint32_t excess, float factor) {
    for (int i = 0; i < TILE_ROWS; i++) to[i] += factor * (float)(int32_t)((uint32_t)sums[i] - excess);
}
HF_LRQ_CLONES(static, collect, (float *to, const int32_t *sums, uint32_t excess, float factor),
              (to, sums, excess, factor))

/* v *= vector (of a stored kind) in place; scratch: [n]. */
static void multiply_stored(float *v, int64_t vector, int64_t first, int64_t n, int64_t kind, float *scratch) {
    hf_lrq_to_float(scratch, POINTER(vector), first, n, (int)kind);
    multiply(v, scratch, n);
}

static int prepare(Run *run, int64_t token) {
    const Call *call = run->call;
    int64_t in = call->in_features;
    float *z = run->z + token * run->padded_in;
    int64_t scratch_size = larger(4 * run->planes.columns, in);
    int32_t *scratch = allocate((size_t)scratch_size * sizeof *scratch);
    if (!scratch) return -1;
    hf_lrq_to_float(z, POINTER(call->x), (run->first_token + token) * call->x_stride, in, (int)call->x_kind);
    memset(z + in, 0, (size_t)(run->padded_in - in) * sizeof *z);
    if (call->rot_in) {
        multiply_stored(z, call->rot_in, 0, in, call->rot_in_kind, (float *)scratch);
        hf_lrq_hadamard(z, in, call->block_in);
    }
    hf_lrq_planes_fill(&run->planes, token, z, scratch);
    free(scratch);
    return 0;
}

static float scalar(int64_t vector, int64_t at, int64_t kind) {
    float value = 1;
    if (vector) hf_lrq_to_float(&value, POINTER(vector), at, 1, (int)kind);
    return value;
}

static int low_rank(Run *run, int64_t part) {
    const Call *call = run->call;
    float *row = allocate((size_t)run->padded_in * sizeof *row);
    if (!row) return -1;
    memset(row, 0, (size_t)run->padded_in * sizeof *row);
    for (int64_t k = part * RANKS_OF_A_PART; k < smaller(call->rank, (part + 1) * RANKS_OF_A_PART); k++) {
        int64_t kind = call->R_kind, at = k * call->in_features;
        if (kind == FOUR_BITS) kind = k % 2 ? HIGH_NIBBLES : LOW_NIBBLES, at = k / 2 * call->in_features;
        hf_lrq_to_float(row, POINTER(call->R), at, call->in_features, (int)kind);
        float scale = scalar(call->R_scale, k, call->R_scale_kind) * scalar(call->L_scale, k, call->L_scale_kind);
        for (int64_t token = 0; token < run->tokens; token++) {
            float sum;
            inner_product(&sum, row, run->z + token * run->padded_in, run->padded_in);
            run->t[token * run->padded_rank + k] = scale * sum;
        }
    }
    free(row);
    return 0;
}

/* Integer sums of one block of 128 rows, made good and collected: to[token * stride + row]. */
static void quantized_rows(const Run *run, const uint8_t *codes, float *to, int64_t stride, int32_t *acc) {
    const Planes *planes = &run->planes;
    const Kernel *kernel = &run->kernel;
    for (int group = 0; group < planes->groups; group++) {
        const uint8_t *x = planes->x + group * planes->padded_planes * planes->plane_bytes;
        for (int64_t chunk = 0; chunk < planes->chunks; chunk++) {
            int64_t first = chunk * planes->chunk_tiles, tiles = smaller(planes->chunk_tiles, planes->tiles - first);
            memset(acc, 0, (size_t)planes->padded_planes * TILE_ROWS * sizeof *acc);
            kernel->dot(codes + first * kernel->tile_bytes, x, first, tiles, planes->tiles, planes->padded_planes,
                        run->multipliers, acc);
            for (int r = 0; r < planes->group_planes; r++) {
                int64_t plane = group * planes->group_planes + r, token = plane / planes->token_planes;
                if (token >= planes->tokens) break;
                float factor = planes->factor[plane % planes->token_planes];
                if (planes->blocks) factor *= planes->scales[token * hf_lrq_scales_of_token(planes) + first / SCALE_TILES];
                collect(to + token * stride, acc + r * TILE_ROWS, planes->excess[plane * planes->chunks + chunk], factor);
            }
        }
    }
}

static int rows(Run *run, int64_t part) {
    const Call *call = run->call;
    int64_t size = run->rows_of_part, start = part * size, count = smaller(size, call->out_features - start);
    int64_t rank = call->rank, padded_rank = run->padded_rank;
    float *y = allocate((size_t)(run->tokens * size + 3 * size + padded_rank) * sizeof *y);
    int32_t *acc = allocate((size_t)run->planes.padded_planes * TILE_ROWS * sizeof *acc);
    if (!y || !acc) {
        free(y);
        free(acc);
        return -1;
    }
    float *scales = y + run->tokens * size, *rot = scales + size, *bias = rot + size, *l = bias + size;
    memset(y, 0, (size_t)(run->tokens * size) * sizeof *y);
    for (int64_t block = 0; block < ceil_div(count, TILE_ROWS); block++)
        quantized_rows(run,
                       (const uint8_t *)POINTER(call->codes) +
                           (start / TILE_ROWS + block) * run->planes.tiles * run->kernel.tile_bytes,
                       y + block * TILE_ROWS, size, acc);
    hf_lrq_to_float(scales, POINTER(call->scales), start, count, (int)call->scales_kind);
    for (int64_t i = 0; i < count; i++) scales[i] *= (float)call->gain;
    for (int64_t token = 0; token < run->tokens; token++) {
        float *to = y + token * size, scale = run->planes.blocks ? 1 : run->planes.scales[token];
        for (int64_t i = 0; i < count; i++) to[i] *= scales[i] * scale;
    }
    if (rank) {
        int64_t stored = call->L_kind == FOUR_BITS ? (rank + 1) / 2 * 2 : rank;
        memset(l + rank, 0, (size_t)(padded_rank - rank) * sizeof *l);
        for (int64_t i = 0; i < count; i++) {
            hf_lrq_to_float(l, POINTER(call->L), (start + i) * stored, rank, (int)call->L_kind);
            for (int64_t token = 0; token < run->tokens; token++) {
                float sum;
                inner_product(&sum, l, run->t + token * padded_rank, padded_rank);
                y[token * size + i] += sum;
            }
        }
    }
    if (call->rot_out) hf_lrq_to_float(rot, POINTER(call->rot_out), start, count, (int)call->rot_out_kind);
    if (call->bias) hf_lrq_to_float(bias, POINTER(call->bias), start, count, (int)call->bias_kind);
    for (int64_t token = 0; token < run->tokens; token++) {
        float *to = y + token * size;
        if (call->rot_out) {
            hf_lrq_hadamard(to, count, call->block_out);
            multiply(to, rot, count);
        }
        if (call->bias) add(to, bias, count);
        hf_lrq_from_float((void *)(intptr_t)call->y, (run->first_token + token) * call->out_features + start, to, count,
                          (int)call->x_kind);
    }
    free(y);
    free(acc);
    return 0;
}

/* Parts were handed out in order, so those awaited are in the hands of threads that wait for nobody or for still
   earlier ones. */
static void await(Run *run, int stage) {
    if (atomic_load(&run->done[stage]) == run->parts[stage]) return;
    pthread_mutex_lock(&run->lock);
    while (atomic_load(&run->done[stage]) < run->parts[stage]) pthread_cond_wait(&run->whole, &run->lock);
    pthread_mutex_unlock(&run->lock);
}

static void finish(Run *run, int stage) {
    if (atomic_fetch_add(&run->done[stage], 1) + 1 < run->parts[stage]) return;
    pthread_mutex_lock(&run->lock);
    pthread_cond_broadcast(&run->whole);
    pthread_mutex_unlock(&run->lock);
}

static void work(void *context) {
    static int (*const STAGE[STAGES])(Run *, int64_t) = {prepare, low_rank, rows};
    Run *run = context;
    for (;;) {
        int64_t part = atomic_fetch_add(&run->next, 1);
        int stage = 0;
        while (stage < STAGES && part >= run->parts[stage]) part -= run->parts[stage++];
        if (stage == STAGES) return;
        for (int before = 0; before < stage; before++) await(run, before);
        if (!atomic_load(&run->failed) && STAGE[stage](run, part)) atomic_store(&run->failed, 1);
        finish(run, stage);
    }
}

static int run_tokens(const Call *call, int64_t first, int64_t tokens) {
    Run run = {.call = call, .first_token = first, .tokens = tokens};
    hf_lrq_kernel(&run.kernel, (int)call->family, (int)call->bits);
    run.multipliers[0] = (uint32_t)call->multipliers[0];
    run.multipliers[1] = (uint32_t)call->multipliers[1];
    int64_t tiles = ceil_div(call->in_features, TILE_COLUMNS);
    run.padded_in = tiles * TILE_COLUMNS;
    run.padded_rank = ceil_div(call->rank, LOW_RANK_PAD) * LOW_RANK_PAD;
    run.rows_of_part = larger(TILE_ROWS, call->rot_out ? call->block_out : 1);
    if (hf_lrq_planes_init(&run.planes, &run.kernel, tokens, tiles, (int)call->digits, (int)call->blocks)) return -1;
    run.z = allocate((size_t)(tokens * run.padded_in) * sizeof *run.z);
    run.t = allocate((size_t)(tokens * run.padded_rank) * sizeof *run.t);
    if (run.z && run.t) {
        memset(run.t, 0, (size_t)(tokens * run.padded_rank) * sizeof *run.t);
        run.parts[PREPARE] = tokens;
        run.parts[LOW_RANK] = ceil_div(call->rank, RANKS_OF_A_PART);
        run.parts[ROWS] = ceil_div(call->out_features, run.rows_of_part);
        pthread_mutex_init(&run.lock, NULL);
        pthread_cond_init(&run.whole, NULL);
        hf_lrq_run(work, &run, (int)smaller(call->threads, run.parts[ROWS]));
        pthread_cond_destroy(&run.whole);
        pthread_mutex_destroy(&run.lock);
    } else {
        run.failed = 1;
    }
    free(run.z);
    free(run.t);
    hf_lrq_planes_free(&run.planes);
    return run.failed ? -1 : 0;
}

/* record: a `Call`, not necessarily aligned. Returns 0, or -1 if memory ran out. */
HF_LRQ_EXPORT int32_t hf_lrq_linear(const void *record) {
    Call call;
    memcpy(&call, record, sizeof call);
    for (int64_t first = 0; first < call.tokens; first += TOKENS_AT_A_TIME)
        if (run_tokens(&call, first, smaller(TOKENS_AT_A_TIME, call.tokens - first))) return -1;
    return 0;
}
