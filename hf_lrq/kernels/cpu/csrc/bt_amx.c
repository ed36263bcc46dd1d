/* The byte-step trellis with the matrix unit (AMX): a tile of the unit is 8 steps of 16 lanes, P and Q. */

#include "bt.h"

#if HF_LRQ_X86
#include <immintrin.h>
#endif

#if HF_LRQ_HAS_AMX

#define SHUFFLES(table, j) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table[j]))

enum { UNIT_ROWS = 16, UNIT_BYTES = 1024, AHEAD = 4096 };

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

/* Rows [first, first + rows) of the lanes, for columns of the block `k` of 8 steps: a tile of the unit for each.
   At 2 bits a block is two tiles of the format, the second of which may be beyond the end. */
#define BUILD(NAME, WORDS)                                                                                             \
    AMX_TARGET ALWAYS_INLINE void NAME(uint8_t *to, const uint8_t *codes, int64_t k, int64_t tiles, int first,         \
                                       int rows, const Constants *c) {                                                 \
        enum { ALL = 8 * WORDS };                                                                                      \
        UNROLL for (int half = 0; half < 2; half++) {                                                                  \
            int64_t tile = WORDS == 1 ? smaller(2 * k + half, tiles - 1) : k;                                          \
            const uint8_t *at = codes + tile * ALL * 64;                                                               \
            if (WORDS == 1) {                                                                                          \
                __m512i before = _mm512_loadu_si512(at + 64 * ((first + 7) % 8));                                      \
                UNROLL for (int p = 0; p < rows; p++) {                                                                \
                    __m512i word = _mm512_loadu_si512(at + 64 * (first + p));                                          \
                    _mm_prefetch((const char *)at + AHEAD + 64 * (first + p), _MM_HINT_T0);                            \
                    products(to + p * UNIT_BYTES + half * 256, word, before, c);                                       \
                    before = word;                                                                                     \
                }                                                                                                      \
            } else {                                                                                                   \
                UNROLL for (int p = 0; p < rows; p++) {                                                                \
                    int q = 2 * (first + p) + half;                                                                    \
                    __m512i word = _mm512_loadu_si512(at + 64 * q);                                                    \
                    _mm_prefetch((const char *)at + AHEAD + 64 * q, _MM_HINT_T0);                                      \
                    products(to + p * UNIT_BYTES + half * 256, word,                                                   \
                             _mm512_loadu_si512(at + 64 * ((q + ALL - 1) % ALL)), c);                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
BUILD(build1, 1)
BUILD(build2, 2)

AMX_TARGET ALWAYS_INLINE void add_sums(int32_t *acc, const int32_t *sums, int planes, int row) {
    for (int m = 0; m < planes; m++) {
        int32_t *to = acc + m * TILE_ROWS + row * LANES;
        _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), _mm512_load_si512(sums + m * LANES)));
    }
}

#define STORE(REGISTER, UNIT, ROW)                                                                                     \
    _tile_stored(REGISTER, sums, 64);                                                                                  \
    add_sums(acc + (UNIT) * planes * TILE_ROWS, sums, planes, ROW);

#define X(UNIT) (x + (((UNIT) * blocks + k) * planes) * 64)

/* One block is built while the unit works on the one before: what it reads was written long enough ago.
   The barrier is for compilers to which a tile load is no use of memory. */
#define LOOP(BUILDER, ROWS, MULTIPLY)                                                                                  \
    for (int first = 0; first < 8; first += ROWS) {                                                                    \
        _tile_zero(0);                                                                                                 \
        _tile_zero(1);                                                                                                 \
        _tile_zero(2);                                                                                                 \
        _tile_zero(3);                                                                                                 \
        BUILDER(buffer[from & 1], codes, from, all_tiles, first, ROWS, &c);                                            \
        for (int64_t k = from; k < to; k++) {                                                                          \
            if (k + 1 < to) BUILDER(buffer[(k + 1) & 1], codes, k + 1, all_tiles, first, ROWS, &c);                    \
            const uint8_t *weights = buffer[k & 1];                                                                    \
            __asm__ volatile("" ::: "memory");                                                                         \
            MULTIPLY                                                                                                   \
        }                                                                                                              \
        __asm__ volatile("" ::: "memory");

#define DOT(NAME, WORDS)                                                                                               \
    AMX_TARGET void NAME(DOT_PARAMETERS) {                                                                             \
        _Alignas(64) uint8_t buffer[2][4 * UNIT_BYTES];                                                                \
        _Alignas(64) int32_t sums[UNIT_ROWS * LANES];                                                                  \
        Constants c = {.m1 = _mm512_set1_epi32((int)multipliers[0]), .m2 = _mm512_set1_epi32((int)multipliers[1])};    \
        for (int j = 0; j < 4; j++) c.new_first[j] = SHUFFLES(NEW_FIRST, j), c.old_first[j] = SHUFFLES(OLD_FIRST, j);  \
        int units = (planes + UNIT_ROWS - 1) / UNIT_ROWS;                                                              \
        planes /= units;                                                                                               \
        const int8_t *x = x_planes;                                                                                    \
        int64_t blocks = WORDS == 1 ? (all_tiles + 1) / 2 : all_tiles;                                                 \
        int64_t from = WORDS == 1 ? first_tile / 2 : first_tile;                                                       \
        int64_t to = WORDS == 1 ? (first_tile + tiles + 1) / 2 : first_tile + tiles;                                   \
        codes -= first_tile * 512 * WORDS;                                                                             \
        configure(planes);                                                                                             \
        if (units == 1) {                                                                                              \
            LOOP(build##WORDS, 4, {                                                                                    \
                _tile_loadd(4, X(0), 64);                                                                              \
                _tile_loadd(6, weights, 64);                                                                           \
                _tile_dpbsud(0, 4, 6);                                                                                 \
                _tile_loadd(7, weights + UNIT_BYTES, 64);                                                              \
                _tile_dpbsud(1, 4, 7);                                                                                 \
                _tile_loadd(6, weights + 2 * UNIT_BYTES, 64);                                                          \
                _tile_dpbsud(2, 4, 6);                                                                                 \
                _tile_loadd(7, weights + 3 * UNIT_BYTES, 64);                                                          \
                _tile_dpbsud(3, 4, 7);                                                                                 \
            })                                                                                                         \
            STORE(0, 0, first) STORE(1, 0, first + 1) STORE(2, 0, first + 2) STORE(3, 0, first + 3) }                  \
        } else if (units == 2) {                                                                                       \
            LOOP(build##WORDS, 2, {                                                                                    \
                _tile_loadd(4, X(0), 64);                                                                              \
                _tile_loadd(5, X(1), 64);                                                                              \
                _tile_loadd(6, weights, 64);                                                                           \
                _tile_loadd(7, weights + UNIT_BYTES, 64);                                                              \
                _tile_dpbsud(0, 4, 6);                                                                                 \
                _tile_dpbsud(1, 5, 6);                                                                                 \
                _tile_dpbsud(2, 4, 7);                                                                                 \
                _tile_dpbsud(3, 5, 7);                                                                                 \
            })                                                                                                         \
            STORE(0, 0, first) STORE(1, 1, first) STORE(2, 0, first + 1) STORE(3, 1, first + 1) }                      \
        } else {                                                                                                       \
            LOOP(build##WORDS, 1, {                                                                                    \
                _tile_loadd(6, weights, 64);                                                                           \
                _tile_loadd(4, X(0), 64);                                                                              \
                _tile_dpbsud(0, 4, 6);                                                                                 \
                _tile_loadd(5, X(1), 64);                                                                              \
                _tile_dpbsud(1, 5, 6);                                                                                 \
                _tile_loadd(4, X(2), 64);                                                                              \
                _tile_dpbsud(2, 4, 6);                                                                                 \
                if (units == 4) {                                                                                      \
                    _tile_loadd(5, X(3), 64);                                                                          \
                    _tile_dpbsud(3, 5, 6);                                                                             \
                }                                                                                                      \
            })                                                                                                         \
            STORE(0, 0, first) STORE(1, 1, first) STORE(2, 2, first)                                                   \
            if (units == 4) { STORE(3, 3, first) } }                                                                   \
        }                                                                                                              \
        _tile_release();                                                                                               \
    }
DOT(hf_lrq_bt1_amx, 1)
DOT(hf_lrq_bt2_amx, 2)

#endif
