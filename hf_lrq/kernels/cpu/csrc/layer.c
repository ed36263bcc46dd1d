/* Compressed linear layers of one input in one call: y = rot_out * H_out(scales * (Q z) + L (R z)) + bias of each, with
   z = H_in(rot_in * x) of all. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>

#include "activations.h"
#include "floats.h"
#include "lowrank.h"
#include "pool.h"
#include "uniform.h"

/* As Python packs it: 64-bit integers, then a double. Kinds are those of `floats.h`; pointers may be 0 where a tensor may
   be absent. */
typedef struct {
    int64_t x, x_stride, x_kind, y; /* x: [tokens] rows x_stride values apart; y: [tokens][out], of the same kind */
    int64_t tokens, in_features;
    int64_t digits, blocks; /* of the activations, see `Planes` */
    int64_t threads;
    int64_t out_features; /* from here on what is the layer's own */
    int64_t codes, family, bits, multipliers[2]; /* of `int`, in their place: columns of a group, groups */
    int64_t scales, scales_kind;
    int64_t rot_in, rot_in_kind, block_in, rot_out, rot_out_kind, block_out;
    int64_t L, L_kind, L_scale, L_scale_kind, R, R_kind, R_scale, R_scale_kind, rank;
    int64_t bias, bias_kind;
    double gain;
} Call;

enum { TOKENS_AT_A_TIME = 32, RANKS_OF_A_PART = 8, STRIP = 1024, ROWS_AT_A_TIME = 32 };

/* Parts of the work, in the order in which they are handed out: prepare a token; some rows of R z; some rows of y.
   Each stage needs the one before whole. */
enum { PREPARE, LOW_RANK, ROWS, STAGES };

/* One of the layers. */
typedef struct {
    const Call *call;
    int64_t padded_rank;
    int64_t rows_of_part;        /* of y: whole Hadamard blocks and whole tiles */
    int64_t parts[STAGES];       /* none of PREPARE */
    float *t;                    /* R z, times both scales; see `place_of_t` */
} Member;

typedef struct {
    const Call *call; /* what holds for all: the input, the codebook and how to run */
    Member *members;
    Kernel kernel;
    uint32_t multipliers[2];
    int64_t first_token, tokens, padded_in, padded_tokens;
    Planes planes;
    float *z; /* [tokens][padded_in] */
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

static int prepare(Run *run, const Member *member, int64_t token) {
    const Call *call = run->call;
    (void)member;
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

/* Few tokens: t[token][padded_rank], for sums along the ranks. More: t[rank][tokens, padded]. */
static float *place_of_t(const Run *run, const Member *member, int64_t token, int64_t rank) {
    return member->t +
           (run->tokens <= FEW_TOKENS ? token * member->padded_rank + rank : rank * run->padded_tokens + token);
}

static int low_rank(Run *run, const Member *member, int64_t part) {
    const Call *call = member->call;
    int64_t in = call->in_features, first = part * RANKS_OF_A_PART, ranks = smaller(RANKS_OF_A_PART, call->rank - first);
    float *R = allocate((size_t)(ranks * STRIP + run->tokens * ranks) * sizeof *R), *sums = R + ranks * STRIP;
    if (!R) return -1;
    memset(sums, 0, (size_t)(run->tokens * ranks) * sizeof *sums);
    for (int64_t column = 0; column < in; column += STRIP) {
        int64_t n = smaller(STRIP, in - column), padded = ceil_div(n, 16) * 16;
        for (int64_t i = 0; i < ranks; i++) {
            int64_t kind = call->R_kind, k = first + i;
            if (kind == FOUR_BITS) kind = k % 2 ? HIGH_NIBBLES : LOW_NIBBLES, k /= 2;
            memset(R + i * STRIP + n, 0, (size_t)(padded - n) * sizeof *R);
            hf_lrq_to_float(R + i * STRIP, POINTER(call->R), k * in + column, n, (int)kind);
        }
        hf_lrq_products(sums, ranks, R, STRIP, ranks, run->z + column, run->padded_in, run->tokens, padded);
    }
    for (int64_t i = 0; i < ranks; i++) {
        int64_t k = first + i;
        float scale = scalar(call->R_scale, k, call->R_scale_kind) * scalar(call->L_scale, k, call->L_scale_kind);
        for (int64_t token = 0; token < run->tokens; token++)
            *place_of_t(run, member, token, k) = scale * sums[token * ranks + i];
    }
    free(R);
    return 0;
}

/* y[token * stride + row] += (L t) for `count` rows from `start` on. */
static int add_low_rank(const Run *run, const Member *member, float *y, int64_t stride, int64_t start, int64_t count) {
    const Call *call = member->call;
    int64_t rank = call->rank, stored = call->L_kind == FOUR_BITS ? (rank + 1) / 2 * 2 : rank;
    int few = run->tokens <= FEW_TOKENS;
    int64_t width = few ? member->padded_rank : rank;
    float *L = allocate((size_t)(ROWS_AT_A_TIME * width) * sizeof *L);
    if (!L) return -1;
    for (int64_t first = 0; first < count; first += ROWS_AT_A_TIME) {
        int64_t rows = smaller(ROWS_AT_A_TIME, count - first);
        if (width == stored) {
            hf_lrq_to_float(L, POINTER(call->L), (start + first) * stored, rows * stored, (int)call->L_kind);
        } else {
            memset(L, 0, (size_t)(rows * width) * sizeof *L);
            for (int64_t i = 0; i < rows; i++)
                hf_lrq_to_float(L + i * width, POINTER(call->L), (start + first + i) * stored, rank, (int)call->L_kind);
        }
        if (few)
            hf_lrq_products(y + first, stride, L, width, rows, member->t, width, run->tokens, width);
        else
            hf_lrq_expand(y + first, stride, L, rows, rank, member->t, run->padded_tokens, run->tokens);
    }
    free(L);
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

static int uniform_rows(const Run *run, const Member *member, float *y, int64_t stride, int64_t start, int64_t count) {
    const Call *call = member->call;
    UniformMatrix matrix = {.codes = POINTER(call->codes),
                            .scales = POINTER(call->scales),
                            .scales_kind = (int)call->scales_kind,
                            .bits = (int)call->bits,
                            .row_bytes = ceil_div(call->in_features, 8) * call->bits,
                            .groups = call->multipliers[1],
                            .group_size = call->multipliers[0]};
    return run->kernel.uniform(&run->planes, &matrix, y, stride, start, count);
}

static int rows(Run *run, const Member *member, int64_t part) {
    const Call *call = member->call;
    int64_t size = member->rows_of_part, start = part * size, count = smaller(size, call->out_features - start);
    float *y = allocate((size_t)(run->tokens * size + 3 * size) * sizeof *y);
    int32_t *acc = allocate((size_t)run->planes.padded_planes * TILE_ROWS * sizeof *acc);
    if (!y || !acc) {
        free(y);
        free(acc);
        return -1;
    }
    float *scales = y + run->tokens * size, *rot = scales + size, *bias = rot + size;
    if (run->kernel.uniform) {
        if (uniform_rows(run, member, y, size, start, count)) {
            free(y);
            free(acc);
            return -1;
        }
        for (int64_t i = 0; i < count; i++) scales[i] = (float)call->gain;
    } else {
        memset(y, 0, (size_t)(run->tokens * size) * sizeof *y);
        for (int64_t block = 0; block < ceil_div(count, TILE_ROWS); block++)
            quantized_rows(run,
                           (const uint8_t *)POINTER(call->codes) +
                               (start / TILE_ROWS + block) * run->planes.tiles * run->kernel.tile_bytes,
                           y + block * TILE_ROWS, size, acc);
        hf_lrq_to_float(scales, POINTER(call->scales), start, count, (int)call->scales_kind);
        for (int64_t i = 0; i < count; i++) scales[i] *= (float)call->gain;
    }
    for (int64_t token = 0; token < run->tokens; token++) {
        float *to = y + token * size, scale = run->planes.blocks ? 1 : run->planes.scales[token];
        multiply(to, scales, count);
        for (int64_t i = 0; i < count; i++) to[i] *= scale;
    }
    if (call->rank && add_low_rank(run, member, y, size, start, count)) {
        free(y);
        free(acc);
        return -1;
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
    static int (*const STAGE[STAGES])(Run *, const Member *, int64_t) = {prepare, low_rank, rows};
    Run *run = context;
    for (;;) {
        int64_t part = atomic_fetch_add(&run->next, 1);
        int stage = 0;
        while (stage < STAGES && part >= run->parts[stage]) part -= run->parts[stage++];
        if (stage == STAGES) return;
        for (int before = 0; before < stage; before++) await(run, before);
        const Member *member = run->members;
        if (stage != PREPARE)
            while (part >= member->parts[stage]) part -= member++->parts[stage];
        if (!atomic_load(&run->failed) && STAGE[stage](run, member, part)) atomic_store(&run->failed, 1);
        finish(run, stage);
    }
}

static int init_member(Run *run, Member *member, const Call *call) {
    member->call = call;
    member->padded_rank = ceil_div(call->rank, RANK_PAD) * RANK_PAD;
    member->rows_of_part = larger(TILE_ROWS, call->rot_out ? call->block_out : 1);
    member->parts[LOW_RANK] = ceil_div(call->rank, RANKS_OF_A_PART);
    member->parts[ROWS] = ceil_div(call->out_features, member->rows_of_part);
    for (int stage = LOW_RANK; stage < STAGES; stage++) run->parts[stage] += member->parts[stage];
    size_t size = (size_t)(run->padded_tokens * member->padded_rank) * sizeof *member->t;
    member->t = allocate(size);
    if (!member->t) return -1;
    memset(member->t, 0, size);
    return 0;
}

/* members: room for `count` of them. */
static int run_tokens(const Call *calls, Member *members, int64_t count, int64_t first, int64_t tokens) {
    const Call *call = calls;
    Run run = {.call = call, .members = members, .first_token = first, .tokens = tokens};
    hf_lrq_kernel(&run.kernel, (int)call->family, (int)call->bits, call->multipliers[0], tokens * call->digits);
    run.multipliers[0] = (uint32_t)call->multipliers[0];
    run.multipliers[1] = (uint32_t)call->multipliers[1];
    int64_t tiles = ceil_div(call->in_features, TILE_COLUMNS);
    run.padded_in = tiles * TILE_COLUMNS;
    run.padded_tokens = ceil_div(tokens, TOKEN_PAD) * TOKEN_PAD;
    run.parts[PREPARE] = tokens;
    if (hf_lrq_planes_init(&run.planes, &run.kernel, tokens, tiles, (int)call->digits, (int)call->blocks)) return -1;
    run.z = allocate((size_t)(tokens * run.padded_in) * sizeof *run.z);
    int failed = !run.z;
    for (int64_t i = 0; i < count; i++) failed |= init_member(&run, members + i, calls + i);
    if (!failed) {
        pthread_mutex_init(&run.lock, NULL);
        pthread_cond_init(&run.whole, NULL);
        hf_lrq_run(work, &run, (int)smaller(call->threads, run.parts[ROWS]));
        pthread_cond_destroy(&run.whole);
        pthread_mutex_destroy(&run.lock);
        failed = atomic_load(&run.failed);
    }
    for (int64_t i = 0; i < count; i++) free(members[i].t);
    free(run.z);
    hf_lrq_planes_free(&run.planes);
    return failed ? -1 : 0;
}

/* records: `count` structures `Call` of layers with the same x, one after the other, not necessarily aligned. Returns 0,
   or -1 if memory ran out. */
HF_LRQ_EXPORT int32_t hf_lrq_linear(const void *records, int64_t count) {
    Call *calls = malloc((size_t)count * (sizeof(Call) + sizeof(Member)));
    if (!calls) return -1;
    memcpy(calls, records, (size_t)count * sizeof *calls);
    Member *members = (Member *)(calls + count);
    int failed = 0;
    for (int64_t first = 0; first < calls->tokens && !failed; first += TOKENS_AT_A_TIME)
        failed = run_tokens(calls, members, count, first, smaller(TOKENS_AT_A_TIME, calls->tokens - first));
    free(calls);
    return failed ? -1 : 0;
}
