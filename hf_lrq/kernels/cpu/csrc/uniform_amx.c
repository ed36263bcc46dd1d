/* The `int` codebook with the matrix unit (AMX): 128 columns of 16 rows are two tiles of codes, which meet the integers
   of up to 16 planes; the sums are collected in float32, since the next columns may have other scales. */

#include "uniform.h"

#include "floats.h"

#if HF_LRQ_HAS_AMX
#include <immintrin.h>

#include "three_bits.h"

enum { PANEL = 64, HALF = PANEL / 2, BLOCK = UNIFORM_BLOCK, UNIT_BYTES = 1024, BLOCKS_AHEAD = 4 };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileConfig;

AMX_TARGET static void configure(void) {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

/* 128 codes of a row, one a byte, in the order of `uniform.h`. */
AMX_TARGET ALWAYS_INLINE void unpack(uint8_t *to, const uint8_t *codes, const int bits) {
    __m512i first, second;
    if (bits == 8) {
        first = _mm512_loadu_si512(codes);
        second = _mm512_loadu_si512(codes + 64);
    } else if (bits == 4) {
        const __m512i low = _mm512_set1_epi8(15);
        __m512i v = _mm512_loadu_si512(codes);
        first = _mm512_and_si512(v, low);
        second = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
    } else if (bits == 2) {
        const __m512i low = _mm512_set1_epi8(3), odd = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
        __m512i v = _mm512_srlv_epi16(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)codes)), odd);
        first = _mm512_and_si512(v, low);
        second = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
    } else {
        first = hf_lrq_three_bits(codes);
        second = hf_lrq_three_bits(codes + 24);
    }
    _mm512_store_si512(to, first);
    _mm512_store_si512(to + UNIT_BYTES, second);
}

/* A panel is unpacked before it is multiplied: what the unit loads has long left the store buffer. */
typedef struct {
    const Planes *planes;
    const UniformMatrix *matrix;
    int64_t blocks, full; /* of 128 columns; of which `full` can be read in place whatever the row */
    int64_t rows, units; /* of this panel; of 16 planes */
    const uint8_t *codes[2 * PANEL]; /* of this panel's rows and of those to come */
    float *scales;                   /* [PANEL][groups] */
    float *sums;                     /* [unit][PANEL][16] */
} Job;

AMX_TARGET ALWAYS_INLINE void unpack_panel(uint8_t *weights, const Job *job, int64_t b, const int bits) {
    const int size = 16 * bits;
    int64_t ahead = b + BLOCKS_AHEAD;
    const uint8_t *const *soon = job->codes;
    if (ahead >= job->blocks) ahead -= job->blocks, soon += PANEL;
    for (int i = 0; i < PANEL; i++) {
        const uint8_t *codes = job->codes[i] + b * size, *next = soon[i] + ahead * size;
        uint8_t room[2 * VECTOR], *to = weights + (i / 16 * 2 * 16 + i % 16) * VECTOR;
        _mm_prefetch((const char *)next, _MM_HINT_T1);
        if (bits == 8) _mm_prefetch((const char *)next + 64, _MM_HINT_T1);
        if (b < job->full) {
            unpack(to, codes, bits);
        } else {
            memset(room, 0, sizeof room);
            memcpy(room, codes, (size_t)larger(smaller(size, job->matrix->row_bytes - b * size), 0));
            unpack(to, room, bits);
        }
    }
}

/* Half of a panel that was multiplied, and what is still to be done with it. */
typedef struct {
    const int32_t *products; /* [HALF][16] */
    float *sums;             /* [HALF][16] */
    const float *scales;     /* of the first row; of the next ones `groups` further on */
    const uint8_t *excess;
} Pending;

/* sums[row][plane] += scale of the row * (products - excess of the plane), times the scale of the plane if `scaled`. */
AMX_TARGET ALWAYS_INLINE void collect(const Pending *p, int first, int count, int64_t groups, int scaled) {
    __m512 less = _mm512_load_ps(p->excess), by = _mm512_load_ps(p->excess + 64);
    UNROLL for (int i = first; i < first + count; i++) {
        __m512 value = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_load_si512(p->products + i * LANES)), less);
        if (scaled) value = _mm512_mul_ps(value, by);
        float *sum = p->sums + i * LANES;
        _mm512_store_ps(sum, _mm512_fmadd_ps(value, _mm512_set1_ps(p->scales[i * groups]), _mm512_load_ps(sum)));
    }
}

/* Products of half a panel with the integers in registers 6 and 7; meanwhile, the half before is collected. The barriers
   are for compilers to which a tile load is no use of memory. */
#define BARRIER __asm__ volatile("" ::: "memory")
#define MULTIPLY(FIRST, SECOND, WEIGHTS, PRODUCTS)                                                                     \
    BARRIER;                                                                                                           \
    _tile_zero(FIRST);                                                                                                 \
    _tile_zero(SECOND);                                                                                                \
    _tile_loadd(4, WEIGHTS, 64);                                                                                       \
    _tile_dpbusd(FIRST, 4, 6);                                                                                         \
    _tile_loadd(5, WEIGHTS + 2 * UNIT_BYTES, 64);                                                                      \
    _tile_dpbusd(SECOND, 5, 6);                                                                                        \
    BARRIER;                                                                                                           \
    if (pending.products) collect(&pending, 0, HALF / 2, groups, scaled);                                              \
    BARRIER;                                                                                                           \
    _tile_loadd(4, WEIGHTS + UNIT_BYTES, 64);                                                                          \
    _tile_dpbusd(FIRST, 4, 7);                                                                                         \
    _tile_loadd(5, WEIGHTS + 3 * UNIT_BYTES, 64);                                                                      \
    _tile_dpbusd(SECOND, 5, 7);                                                                                        \
    BARRIER;                                                                                                           \
    if (pending.products) collect(&pending, HALF / 2, HALF / 2, groups, scaled);                                       \
    BARRIER;                                                                                                           \
    _tile_stored(FIRST, PRODUCTS, 64);                                                                                 \
    _tile_stored(SECOND, PRODUCTS + 16 * LANES, 64);                                                                   \
    BARRIER

AMX_TARGET ALWAYS_INLINE void panel(const Job *job, const int bits, const int scaled) {
    _Alignas(4096) uint8_t weights[PANEL / 8 * UNIT_BYTES];
    _Alignas(64) int32_t products[2][HALF * LANES];
    int64_t groups = job->matrix->groups;
    Pending pending = {0};
    for (int64_t b = 0; b < job->blocks; b++) {
        unpack_panel(weights, job, b, bits);
        const float *scales = job->scales + smaller(b * BLOCK / job->matrix->group_size, groups - 1);
        for (int64_t unit = 0; unit < job->units; unit++) {
            const uint8_t *x = job->planes->x + (unit * job->blocks + b) * UNIFORM_BLOCK_BYTES;
            float *sums = job->sums + unit * PANEL * LANES;
            BARRIER;
            _tile_loadd(6, x, 64);
            _tile_loadd(7, x + UNIT_BYTES, 64);
            MULTIPLY(0, 1, weights, products[0]);
            pending = (Pending){products[0], sums, scales, x + 2 * UNIT_BYTES};
            MULTIPLY(2, 3, weights + 4 * UNIT_BYTES, products[1]);
            pending = (Pending){products[1], sums + HALF * LANES, scales + HALF * groups, x + 2 * UNIT_BYTES};
        }
    }
    collect(&pending, 0, HALF, groups, scaled);
}

/* Planes of a token, put together. */
ALWAYS_INLINE void finish_token(float *restrict to, const Job *job, int64_t token, const int planes) {
    const float *sums[3];
    for (int k = 0; k < planes; k++) {
        int64_t plane = token * planes + k;
        sums[k] = job->sums + plane / LANES * PANEL * LANES + plane % LANES;
    }
    for (int64_t i = 0; i < job->rows; i++) {
        float y = sums[planes - 1][i * LANES];
        for (int k = planes - 2; k >= 0; k--) y = 256 * y + sums[k][i * LANES];
        to[i] = 2 * y;
    }
}

static void finish(const Job *job, float *to, int64_t stride) {
    for (int64_t token = 0; token < job->planes->tokens; token++, to += stride) {
        if (job->planes->token_planes == 1)
            finish_token(to, job, token, 1);
        else if (job->planes->token_planes == 2)
            finish_token(to, job, token, 2);
        else
            finish_token(to, job, token, 3);
    }
}

#define PANELS(BITS)                                                                                                   \
    AMX_TARGET static void panel_##BITS(const Job *job) { panel(job, BITS, 0); }                                       \
    AMX_TARGET static void scaled_panel_##BITS(const Job *job) { panel(job, BITS, 1); }
PANELS(2)
PANELS(3)
PANELS(4)
PANELS(8)

typedef void (*PanelFunction)(const Job *);

static PanelFunction function_for(int bits, int scaled) {
    static const PanelFunction TABLE[4][2] = {
        {panel_2, scaled_panel_2}, {panel_3, scaled_panel_3}, {panel_4, scaled_panel_4}, {panel_8, scaled_panel_8}};
    return TABLE[bits == 8 ? 3 : bits - 2][scaled];
}

/* Row `row` of the matrix, or the last one. */
static const uint8_t *codes_of(const UniformMatrix *matrix, int64_t row, int64_t end) {
    return matrix->codes + smaller(row, end - 1) * matrix->row_bytes;
}

AMX_TARGET int hf_lrq_uniform_amx(const Planes *planes, const UniformMatrix *matrix, float *to, int64_t stride,
                                  int64_t first, int64_t rows) {
    int64_t size = BLOCK * matrix->bits / 8, read = matrix->bits == 3 ? 56 : size, groups = matrix->groups;
    Job job = {.planes = planes,
               .matrix = matrix,
               .blocks = planes->columns / BLOCK,
               .full = matrix->row_bytes < read ? 0 : (matrix->row_bytes - read) / size + 1,
               .units = ceil_div(planes->tokens * planes->token_planes, LANES)};
    job.scales = allocate((size_t)(PANEL * groups) * sizeof *job.scales);
    job.sums = allocate((size_t)(job.units * PANEL * LANES) * sizeof *job.sums);
    if (!job.scales || !job.sums) {
        free(job.scales);
        free(job.sums);
        return -1;
    }
    PanelFunction function = function_for(matrix->bits, planes->blocks != 0);
    configure();
    for (int64_t start = 0; start < rows; start += PANEL) {
        job.rows = smaller(PANEL, rows - start);
        for (int i = 0; i < 2 * PANEL; i++) job.codes[i] = codes_of(matrix, first + start + i, first + rows);
        memset(job.scales, 0, (size_t)(PANEL * groups) * sizeof *job.scales);
        memset(job.sums, 0, (size_t)(job.units * PANEL * LANES) * sizeof *job.sums);
        hf_lrq_to_float(job.scales, matrix->scales, (first + start) * groups, job.rows * groups, matrix->scales_kind);
        function(&job);
        finish(&job, to + start, stride);
    }
    _tile_release();
    free(job.scales);
    free(job.sums);
    return 0;
}

#endif
