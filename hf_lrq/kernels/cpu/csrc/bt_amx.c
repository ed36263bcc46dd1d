/* The byte-step trellis with the matrix unit (AMX): a tile of the unit is P or Q of 16 steps of 16 lanes. */

#include "bt.h"

#if HF_LRQ_HAS_AMX
#include <immintrin.h>

#define SHUFFLES(table, j) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table[j]))

/* A block is 64 columns: a tile of P and one of Q, which meet the same integers. All rows are taken of a chunk of blocks
   before the next one, so that its codes and integers stay in the second cache. */
enum { UNIT_ROWS = 16, UNIT_BYTES = 1024, CHUNK = 64, SLOT_BYTES = 3 * UNIT_BYTES };

typedef struct {
    __m512i new_first[4], old_first[4], m1, m2;
} Constants;

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Registers 0..3 are sums and 4, 5 integers, of `planes` rows; 6, 7 are weights. */
AMX_TARGET static void configure(int planes) {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = (uint8_t)(i < 6 ? planes : UNIT_ROWS);
    _tile_loadconfig(&config);
}

/* Products of the four steps of a word. */
AMX_TARGET ALWAYS_INLINE void products(uint8_t *to, __m512i word, __m512i before, const Constants *c) {
    __m512i start_of = _mm512_mask_blend_epi8(0x8888888888888888, word, before);
    UNROLL for (int j = 0; j < 4; j++) {
        __m512i source = j ? word : start_of;
        __m512i P = _mm512_mullo_epi32(_mm512_shuffle_epi8(source, c->new_first[j]), c->m1);
        __m512i Q = _mm512_mullo_epi32(_mm512_shuffle_epi8(source, c->old_first[j]), c->m2);
        _mm512_store_si512(to + 64 * j, P);
        _mm512_store_si512(to + UNIT_BYTES + 64 * j, Q);
    }
}

typedef struct {
    const uint8_t *codes;
    const int8_t *x;
    int64_t all_tiles, blocks;  /* tiles of the format; blocks there are */
    int64_t from, to, end;      /* blocks of this chunk, and the end of all chunks */
    int units, rows;            /* units of up to 16 planes, and planes of each */
    int now;                    /* place in the ring of what comes next */
    Constants c;
    uint8_t *ring;
    int32_t *acc;
} Job;

/* P and Q of row `row` of the lanes and block k. Blocks beyond the end of the chunk are those of the rows to come, `rows`
   at a time, then those of the next chunk. Tiles may be beyond the end of all: whatever stands there meets zeros. */
AMX_TARGET ALWAYS_INLINE void build(uint8_t *to, const Job *job, int64_t k, int row, const int rows, const int words) {
    const int all = 8 * words, tiles = 4 / words;
    for (; k >= job->to && row < 8; row += rows) k -= job->to - job->from;
    if (row >= 8) k = smaller(k + job->to - job->from, job->end - 1), row -= 8;
    UNROLL for (int i = 0; i < 4; i++) {
        const uint8_t *tile = job->codes + smaller(tiles * k + i / words, job->all_tiles - 1) * all * 64;
        int q = words * row + i % words;
        _mm_prefetch((const char *)tile + CHUNK * tiles * all * 64 + 64 * q, _MM_HINT_T1);
        products(to + i * 256, _mm512_loadu_si512(tile + 64 * q), _mm512_loadu_si512(tile + 64 * ((q + all - 1) % all)),
                 &job->c);
    }
}

/* Weights are built two places before the unit reads them, in a ring of four: what it reads has left the store buffer
   then, and lies at other offsets in its page than what is being written. The barrier is for compilers to which a tile
   load is no use of memory. */
#define SLOT(I) (job->ring + ((I) & 3) * SLOT_BYTES)
#define BUILD(K, ROW, I) build(SLOT(I), job, K, ROW, rows, words)
#define WEIGHTS(REGISTER, I, WHICH)                                                                                    \
    do {                                                                                                               \
        __asm__ volatile("" ::: "memory");                                                                             \
        _tile_loadd(REGISTER, SLOT(I) + (WHICH) * UNIT_BYTES, 64);                                                     \
    } while (0)
#define INTEGERS(REGISTER, UNIT) _tile_loadd(REGISTER, job->x + ((UNIT) * job->blocks + k) * job->rows * 64, 64)
#define SUMS(UNIT, ROW) (job->acc + (UNIT) * job->rows * TILE_ROWS + (ROW) * LANES)
#define LOAD_SUMS(REGISTER, UNIT, ROW) _tile_loadd(REGISTER, SUMS(UNIT, ROW), TILE_ROWS * sizeof(int32_t))
#define STORE_SUMS(REGISTER, UNIT, ROW) _tile_stored(REGISTER, SUMS(UNIT, ROW), TILE_ROWS * sizeof(int32_t))

/* Four rows of the lanes at a time. */
AMX_TARGET ALWAYS_INLINE void one_unit(const Job *job, const int words) {
    enum { rows = 4 };
    for (int row = 0; row < 8; row += 4) {
        LOAD_SUMS(0, 0, row);
        LOAD_SUMS(1, 0, row + 1);
        LOAD_SUMS(2, 0, row + 2);
        LOAD_SUMS(3, 0, row + 3);
        for (int64_t k = job->from; k < job->to; k++) {
            INTEGERS(4, 0);
            BUILD(k, row + 2, 2);
            WEIGHTS(6, 0, 0);
            _tile_dpbsud(0, 4, 6);
            WEIGHTS(7, 1, 0);
            _tile_dpbsud(1, 4, 7);
            BUILD(k, row + 3, 3);
            WEIGHTS(6, 2, 0);
            _tile_dpbsud(2, 4, 6);
            WEIGHTS(7, 3, 0);
            _tile_dpbsud(3, 4, 7);
            WEIGHTS(6, 0, 1);
            _tile_dpbsud(0, 4, 6);
            WEIGHTS(7, 1, 1);
            _tile_dpbsud(1, 4, 7);
            BUILD(k + 1, row, 0);
            WEIGHTS(6, 2, 1);
            _tile_dpbsud(2, 4, 6);
            WEIGHTS(7, 3, 1);
            _tile_dpbsud(3, 4, 7);
            BUILD(k + 1, row + 1, 1);
        }
        STORE_SUMS(0, 0, row);
        STORE_SUMS(1, 0, row + 1);
        STORE_SUMS(2, 0, row + 2);
        STORE_SUMS(3, 0, row + 3);
    }
}

/* Two rows. */
AMX_TARGET ALWAYS_INLINE void two_units(Job *job, const int words) {
    enum { rows = 2 };
    int now = job->now;
    for (int row = 0; row < 8; row += 2) {
        LOAD_SUMS(0, 0, row);
        LOAD_SUMS(1, 1, row);
        LOAD_SUMS(2, 0, row + 1);
        LOAD_SUMS(3, 1, row + 1);
        for (int64_t k = job->from; k < job->to; k++, now ^= 2) {
            INTEGERS(4, 0);
            INTEGERS(5, 1);
            BUILD(k + 1, row, now + 2);
            WEIGHTS(6, now, 0);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 5, 6);
            WEIGHTS(7, now + 1, 0);
            _tile_dpbsud(2, 4, 7);
            _tile_dpbsud(3, 5, 7);
            BUILD(k + 1, row + 1, now + 3);
            WEIGHTS(6, now, 1);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 5, 6);
            WEIGHTS(7, now + 1, 1);
            _tile_dpbsud(2, 4, 7);
            _tile_dpbsud(3, 5, 7);
        }
        STORE_SUMS(0, 0, row);
        STORE_SUMS(1, 1, row);
        STORE_SUMS(2, 0, row + 1);
        STORE_SUMS(3, 1, row + 1);
    }
    job->now = now;
}

/* Three or four: one row. */
AMX_TARGET ALWAYS_INLINE void more_units(Job *job, const int words) {
    enum { rows = 1 };
    int now = job->now;
    for (int row = 0; row < 8; row++) {
        LOAD_SUMS(0, 0, row);
        LOAD_SUMS(1, 1, row);
        LOAD_SUMS(2, 2, row);
        if (job->units == 4) LOAD_SUMS(3, 3, row);
        for (int64_t k = job->from; k < job->to; k++, now = (now + 1) & 3) {
            BUILD(k + 2, row, now + 2);
            WEIGHTS(6, now, 0);
            INTEGERS(4, 0);
            _tile_dpbsud(0, 4, 6);
            INTEGERS(5, 1);
            _tile_dpbsud(1, 5, 6);
            INTEGERS(4, 2);
            _tile_dpbsud(2, 4, 6);
            if (job->units == 4) {
                INTEGERS(5, 3);
                _tile_dpbsud(3, 5, 6);
            }
            WEIGHTS(7, now, 1);
            INTEGERS(4, 0);
            _tile_dpbsud(0, 4, 7);
            INTEGERS(5, 1);
            _tile_dpbsud(1, 5, 7);
            INTEGERS(4, 2);
            _tile_dpbsud(2, 4, 7);
            if (job->units == 4) {
                INTEGERS(5, 3);
                _tile_dpbsud(3, 5, 7);
            }
        }
        STORE_SUMS(0, 0, row);
        STORE_SUMS(1, 1, row);
        STORE_SUMS(2, 2, row);
        if (job->units == 4) STORE_SUMS(3, 3, row);
    }
    job->now = now;
}

AMX_TARGET ALWAYS_INLINE void dot(DOT_PARAMETERS, const int words) {
    _Alignas(4096) uint8_t ring[4 * SLOT_BYTES];
    int per_block = 4 / words, units = (planes + UNIT_ROWS - 1) / UNIT_ROWS;
    Job job = {.codes = codes - first_tile * 512 * words,
               .x = x_planes,
               .all_tiles = all_tiles,
               .blocks = ceil_div(all_tiles, per_block),
               .units = units,
               .rows = planes / units,
               .ring = ring,
               .acc = acc};
    job.c.m1 = _mm512_set1_epi32((int)multipliers[0]);
    job.c.m2 = _mm512_set1_epi32((int)multipliers[1]);
    UNROLL for (int j = 0; j < 4; j++) {
        job.c.new_first[j] = SHUFFLES(NEW_FIRST, j);
        job.c.old_first[j] = SHUFFLES(OLD_FIRST, j);
    }
    configure(job.rows);
    __asm__ volatile("" ::: "memory");
    const int64_t start = first_tile / per_block;
    const int rows = units == 1 ? 4 : units == 2 ? 2 : 1;
    job.end = ceil_div(first_tile + tiles, per_block);
    for (job.to = start; job.to < job.end;) {
        job.from = job.to;
        /* No chunk after another one is a single block, or two ahead could be two rows ahead. */
        job.to = job.end - job.from < CHUNK + 2 ? job.end : job.from + CHUNK;
        for (int i = 0; i < 2 && job.from == start; i++)
            build(ring + i * SLOT_BYTES, &job, start + i / smaller(rows, 2), i % rows, rows, words);
        if (units == 1)
            one_unit(&job, words);
        else if (units == 2)
            two_units(&job, words);
        else
            more_units(&job, words);
    }
    __asm__ volatile("" ::: "memory");
    _tile_release();
}

AMX_TARGET void hf_lrq_bt1_amx(DOT_PARAMETERS) {
    dot(codes, x_planes, first_tile, tiles, all_tiles, planes, multipliers, acc, 1);
}

AMX_TARGET void hf_lrq_bt2_amx(DOT_PARAMETERS) {
    dot(codes, x_planes, first_tile, tiles, all_tiles, planes, multipliers, acc, 2);
}

#endif
