/* The byte-step trellis with the matrix unit (AMX): a tile of the unit is 8 steps of 16 lanes, P and Q. */

#include "bt.h"

#if HF_LRQ_X86
#include <immintrin.h>
#endif

#if HF_LRQ_HAS_AMX

#define SHUFFLES(table, j) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table[j]))

/* Tiles of the format that all rows are taken of before the next ones: they stay in the first cache, and the next ones
   are prefetched meanwhile. */
enum { UNIT_ROWS = 16, UNIT_BYTES = 1024, CHUNK_TILES = 64 };

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

/* Products of the four steps of a word: P to rows 0..3 of `to`, Q to rows 8..11. */
AMX_TARGET ALWAYS_INLINE void products(uint8_t *to, __m512i word, __m512i before, const Constants *c) {
    __m512i start_of = _mm512_mask_blend_epi8(0x8888888888888888, word, before);
    UNROLL for (int j = 0; j < 4; j++) {
        __m512i source = j ? word : start_of;
        _mm512_store_si512(to + 64 * j, _mm512_mullo_epi32(_mm512_shuffle_epi8(source, c->new_first[j]), c->m1));
        _mm512_store_si512(to + 64 * (8 + j), _mm512_mullo_epi32(_mm512_shuffle_epi8(source, c->old_first[j]), c->m2));
    }
}

/* A tile of the unit: row `row` of the lanes, columns of block `k` of 8 steps. At 2 bits a block is two tiles of the
   format, the second of which may be beyond the end: whatever stands there meets zeros. */
AMX_TARGET ALWAYS_INLINE void build(uint8_t *to, const uint8_t *codes, int64_t k, int64_t tiles, int row, int words,
                                    const Constants *c) {
    int all = 8 * words;
    UNROLL for (int half = 0; half < 2; half++) {
        const uint8_t *tile = codes + (words == 1 ? smaller(2 * k + half, tiles - 1) : k) * all * 64;
        int q = words == 1 ? row : 2 * row + half;
        _mm_prefetch((const char *)tile + CHUNK_TILES * all * 64 + 64 * q, _MM_HINT_T1);
        products(to + half * 256, _mm512_loadu_si512(tile + 64 * q), _mm512_loadu_si512(tile + 64 * ((q + all - 1) % all)), c);
    }
}

typedef struct {
    const uint8_t *codes;
    const int8_t *x;
    int32_t *acc;
    int64_t all_tiles, blocks, from, to; /* tiles of the format; blocks of 8 steps there are, and those to take */
    int units, rows;                     /* units of up to 16 planes, and planes of each */
    Constants c;
    uint8_t *ring;
} Job;

/* Weights are built two tiles before the unit reads them, in a ring of four: what it reads has left the store buffer
   then, and lies at other offsets in its page than what is being written. The barrier is for compilers to which a tile
   load is no use of memory. */
#define BUILD(K, ROW, SLOT)                                                                                            \
    build(job->ring + (SLOT) * UNIT_BYTES, job->codes, smaller(K, job->to - 1), job->all_tiles, ROW, words, &job->c)
#define WEIGHTS(REGISTER, SLOT)                                                                                        \
    do {                                                                                                               \
        __asm__ volatile("" ::: "memory");                                                                             \
        _tile_loadd(REGISTER, job->ring + (SLOT) * UNIT_BYTES, 64);                                                    \
    } while (0)
#define INTEGERS(REGISTER, UNIT) _tile_loadd(REGISTER, job->x + ((UNIT) * job->blocks + k) * job->rows * 64, 64)
#define SUMS(UNIT, ROW) (job->acc + (UNIT) * job->rows * TILE_ROWS + (ROW) * LANES)
#define LOAD_SUMS(REGISTER, UNIT, ROW) _tile_loadd(REGISTER, SUMS(UNIT, ROW), TILE_ROWS * sizeof(int32_t))
#define STORE_SUMS(REGISTER, UNIT, ROW) _tile_stored(REGISTER, SUMS(UNIT, ROW), TILE_ROWS * sizeof(int32_t))

/* Four rows of the lanes at a time. */
AMX_TARGET ALWAYS_INLINE void one_unit(const Job *job, int words) {
    for (int row = 0; row < 8; row += 4) {
        LOAD_SUMS(0, 0, row);
        LOAD_SUMS(1, 0, row + 1);
        LOAD_SUMS(2, 0, row + 2);
        LOAD_SUMS(3, 0, row + 3);
        BUILD(job->from, row, 0);
        BUILD(job->from, row + 1, 1);
        for (int64_t k = job->from; k < job->to; k++) {
            INTEGERS(4, 0);
            BUILD(k, row + 2, 2);
            WEIGHTS(6, 0);
            _tile_dpbsud(0, 4, 6);
            BUILD(k, row + 3, 3);
            WEIGHTS(7, 1);
            _tile_dpbsud(1, 4, 7);
            BUILD(k + 1, row, 0);
            WEIGHTS(6, 2);
            _tile_dpbsud(2, 4, 6);
            BUILD(k + 1, row + 1, 1);
            WEIGHTS(7, 3);
            _tile_dpbsud(3, 4, 7);
        }
        STORE_SUMS(0, 0, row);
        STORE_SUMS(1, 0, row + 1);
        STORE_SUMS(2, 0, row + 2);
        STORE_SUMS(3, 0, row + 3);
    }
}

/* Two rows. */
AMX_TARGET ALWAYS_INLINE void two_units(const Job *job, int words) {
    for (int row = 0; row < 8; row += 2) {
        LOAD_SUMS(0, 0, row);
        LOAD_SUMS(1, 1, row);
        LOAD_SUMS(2, 0, row + 1);
        LOAD_SUMS(3, 1, row + 1);
        BUILD(job->from, row, 0);
        BUILD(job->from, row + 1, 1);
        int now = 0;
        for (int64_t k = job->from; k < job->to; k++, now ^= 2) {
            INTEGERS(4, 0);
            INTEGERS(5, 1);
            BUILD(k + 1, row, now ^ 2);
            WEIGHTS(6, now);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 5, 6);
            BUILD(k + 1, row + 1, (now ^ 2) + 1);
            WEIGHTS(7, now + 1);
            _tile_dpbsud(2, 4, 7);
            _tile_dpbsud(3, 5, 7);
        }
        STORE_SUMS(0, 0, row);
        STORE_SUMS(1, 1, row);
        STORE_SUMS(2, 0, row + 1);
        STORE_SUMS(3, 1, row + 1);
    }
}

/* Three or four: one row. */
AMX_TARGET ALWAYS_INLINE void more_units(const Job *job, int words) {
    for (int row = 0; row < 8; row++) {
        LOAD_SUMS(0, 0, row);
        LOAD_SUMS(1, 1, row);
        LOAD_SUMS(2, 2, row);
        if (job->units == 4) LOAD_SUMS(3, 3, row);
        BUILD(job->from, row, 0);
        BUILD(job->from + 1, row, 1);
        int now = 0;
        for (int64_t k = job->from; k < job->to; k++, now = (now + 1) & 3) {
            BUILD(k + 2, row, (now + 2) & 3);
            WEIGHTS(6, now);
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
        }
        STORE_SUMS(0, 0, row);
        STORE_SUMS(1, 1, row);
        STORE_SUMS(2, 2, row);
        if (job->units == 4) STORE_SUMS(3, 3, row);
    }
}

AMX_TARGET ALWAYS_INLINE void dot(DOT_PARAMETERS, int words) {
    _Alignas(4096) uint8_t ring[4 * UNIT_BYTES];
    int per_block = words == 1 ? 2 : 1, units = (planes + UNIT_ROWS - 1) / UNIT_ROWS;
    Job job = {.codes = codes - first_tile * 512 * words,
               .x = x_planes,
               .acc = acc,
               .all_tiles = all_tiles,
               .blocks = ceil_div(all_tiles, per_block),
               .units = units,
               .rows = planes / units,
               .ring = ring};
    job.c.m1 = _mm512_set1_epi32((int)multipliers[0]);
    job.c.m2 = _mm512_set1_epi32((int)multipliers[1]);
    UNROLL for (int j = 0; j < 4; j++) {
        job.c.new_first[j] = SHUFFLES(NEW_FIRST, j);
        job.c.old_first[j] = SHUFFLES(OLD_FIRST, j);
    }
    configure(job.rows);
    __asm__ volatile("" ::: "memory");
    int64_t end = ceil_div(first_tile + tiles, per_block);
    for (job.to = first_tile / per_block; job.to < end;) {
        job.from = job.to;
        job.to = smaller(job.from + CHUNK_TILES / per_block, end);
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
