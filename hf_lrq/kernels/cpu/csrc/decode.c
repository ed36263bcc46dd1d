/* Stored codes to values, blocks of rows at a time. */

#include <stdatomic.h>

#include "common.h"

#if HF_LRQ_HAS_AVX512
#include <immintrin.h>
#endif

#include "bt.h"
#include "floats.h"
#include "pool.h"

#define SHUFFLES(table, j) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table[j]))

enum { STRIP_TILES = 8, STRIP = STRIP_TILES * TILE_COLUMNS };

typedef struct {
    const uint8_t *codes; /* of the first of the rows */
    uint8_t *values;
    int64_t rows, in_features, kind;
    int family, bits;
    uint32_t multipliers[2];
    float gain;
    atomic_int_least64_t next;
} Decoding;

ALWAYS_INLINE uint64_t four_values(uint32_t even, uint32_t odd) {
    uint64_t e = (even & 0xffff) | (uint64_t)(even >> 16) << 32, o = (odd & 0xffff) | (uint64_t)(odd >> 16) << 32;
    return e | o << 16;
}

/* y[row * STRIP + column] of one tile. */
ALWAYS_INLINE void byte_tile(int16_t *y, const uint8_t *tile, const uint32_t *multipliers, int words) {
    uint32_t first = multipliers[0] * 0x10001u, second = multipliers[1] * 0x10001u, word[16 * LANES];
    int all = 8 * words;
    memcpy(word, tile, (size_t)all * 64);
    for (int q = 0; q < all; q++) {
        const uint32_t *now = word + q * LANES, *before = word + (q + all - 1) % all * LANES;
        uint64_t four[4][LANES];
        for (int j = 0; j < 4; j++)
            for (int lane = 0; lane < LANES; lane++) {
                uint32_t b = now[lane] >> 8 * j & 255, a = j ? now[lane] >> (8 * j - 8) & 255 : before[lane] >> 24;
                uint32_t P = (b | a << 8) * first, Q = (a | b << 8) * second;
                uint32_t even = (P & 0x00ff00ff) + (Q & 0x00ff00ff), odd = (P >> 8 & 0x00ff00ff) + (Q >> 8 & 0x00ff00ff);
                four[j][lane] = four_values(even, odd);
            }
        for (int lane = 0; lane < LANES; lane++) {
            int16_t *to = y + (q / words * LANES + lane) * STRIP + q % words * 8;
            if (words == 1) {
                for (int j = 0; j < 4; j++) memcpy(to + 4 * j, &four[j][lane], 8);
                for (int v = 0; v < 16; v++) to[v] = (int16_t)(to[v] - 255);
            } else {
                int16_t s[4];
                for (int j = 0; j < 4; j++) {
                    memcpy(s, &four[j][lane], 8);
                    to[2 * j] = (int16_t)(s[0] - s[1] + s[2] - s[3]);
                    to[2 * j + 1] = (int16_t)(s[0] + s[1] - s[2] - s[3]);
                }
            }
        }
    }
}

ALWAYS_INLINE void bit_tile(int16_t *y, const uint8_t *tile, uint32_t multiplier, int bits) {
    uint32_t word[17][LANES]; /* the last word once more in front */
    memcpy(word[1], tile, (size_t)(256 * bits));
    memcpy(word[0], word[4 * bits], sizeof word[0]);
    for (int p = 0; p < 8; p++) {
        int16_t column[TILE_COLUMNS][LANES];
        for (int i = 0; i < TILE_COLUMNS; i++) {
            int start = 32 + (16 * p + i + 1) * bits - 16, shift = start % 32, cut = shift > 16;
            const uint32_t *now = word[start / 32], *next = word[start / 32 + cut];
            for (int lane = 0; lane < LANES; lane++) {
                uint32_t window = now[lane] >> shift;
                if (cut) window |= next[lane] << (32 - shift);
                uint32_t hash = (window & 0xffff) * multiplier, halves = (hash & 0x00ff00ff) + (hash >> 8 & 0x00ff00ff);
                column[i][lane] = (int16_t)((halves & 0xffff) + (halves >> 16) - 510);
            }
        }
        for (int lane = 0; lane < LANES; lane++)
            ROLLED for (int i = 0; i < TILE_COLUMNS; i++) y[(p * LANES + lane) * STRIP + i] = column[i][lane];
    }
}

#if HF_LRQ_HAS_AVX512
/* Four steps of a word for 16 lanes, as [lane][16] int16: unpacked in pairs of lanes, then sorted by lane. */
AVX512_TARGET static void byte_tile_avx512(int16_t *y, const uint8_t *tile, const uint32_t *multipliers, int words) {
    const __m512i low = _mm512_set1_epi32(0x00ff00ff);
    const __m512i first = _mm512_set1_epi32((int)multipliers[0]), second = _mm512_set1_epi32((int)multipliers[1]);
    int all = 8 * words;
    __m512i before = _mm512_loadu_si512(tile + 64 * (all - 1));
    for (int q = 0; q < all; q++) {
        __m512i word = _mm512_loadu_si512(tile + 64 * q), lanes[2][4]; /* [lanes 0, 1 or 2, 3 of each four][step] */
        __m512i start_of = _mm512_mask_blend_epi8(0x8888888888888888, word, before);
        before = word;
        UNROLL for (int j = 0; j < 4; j++) {
            __m512i source = j ? word : start_of;
            __m512i P = _mm512_mullo_epi32(_mm512_shuffle_epi8(source, SHUFFLES(NEW_FIRST, j)), first);
            __m512i Q = _mm512_mullo_epi32(_mm512_shuffle_epi8(source, SHUFFLES(OLD_FIRST, j)), second);
            __m512i even = _mm512_add_epi16(_mm512_and_si512(P, low), _mm512_and_si512(Q, low));
            __m512i odd = _mm512_add_epi16(_mm512_srli_epi16(P, 8), _mm512_srli_epi16(Q, 8));
            if (words == 1) {
                even = _mm512_sub_epi16(even, _mm512_set1_epi16(255));
                odd = _mm512_sub_epi16(odd, _mm512_set1_epi16(255));
                lanes[0][j] = _mm512_unpacklo_epi16(even, odd);
                lanes[1][j] = _mm512_unpackhi_epi16(even, odd);
            } else { /* even = (s0, s2), odd = (s1, s3): y0 = s0 + s2 - (s1 + s3), y1 = s0 - s2 + (s1 - s3) */
                const __m512i ones = _mm512_set1_epi16(1), signs = _mm512_set1_epi32((int)0xffff0001);
                __m512i y0 = _mm512_sub_epi32(_mm512_madd_epi16(even, ones), _mm512_madd_epi16(odd, ones));
                __m512i y1 = _mm512_add_epi32(_mm512_madd_epi16(even, signs), _mm512_madd_epi16(odd, signs));
                lanes[0][j] = _mm512_mask_blend_epi16(0xaaaaaaaa, y0, _mm512_slli_epi32(y1, 16)); /* [lane][2] */
            }
        }
        int16_t *to = y + q / words * LANES * STRIP + q % words * 8;
        if (words == 1) {
            UNROLL for (int half = 0; half < 2; half++) {
                __m512i ab = _mm512_unpacklo_epi64(lanes[half][0], lanes[half][1]); /* first of each pair: steps 0, 1 */
                __m512i cd = _mm512_unpacklo_epi64(lanes[half][2], lanes[half][3]);
                __m512i ef = _mm512_unpackhi_epi64(lanes[half][0], lanes[half][1]); /* second of each pair */
                __m512i gh = _mm512_unpackhi_epi64(lanes[half][2], lanes[half][3]);
                _Alignas(64) int16_t parts[4][32];
                _mm512_store_si512(parts[0], ab);
                _mm512_store_si512(parts[1], cd);
                _mm512_store_si512(parts[2], ef);
                _mm512_store_si512(parts[3], gh);
                UNROLL for (int k = 0; k < 4; k++) UNROLL for (int m = 0; m < 4; m++) /* lane 4k + 2 half + m / 2 */
                    memcpy(to + (4 * k + 2 * half + m / 2) * STRIP + m % 2 * 8, parts[m] + 8 * k, 16);
            }
        } else {
            __m512i ab = _mm512_unpacklo_epi32(lanes[0][0], lanes[0][1]), cd = _mm512_unpacklo_epi32(lanes[0][2], lanes[0][3]);
            __m512i ef = _mm512_unpackhi_epi32(lanes[0][0], lanes[0][1]), gh = _mm512_unpackhi_epi32(lanes[0][2], lanes[0][3]);
            _Alignas(64) int16_t parts[4][32]; /* lane 4k + m: 8 values */
            _mm512_store_si512(parts[0], _mm512_unpacklo_epi64(ab, cd));
            _mm512_store_si512(parts[1], _mm512_unpackhi_epi64(ab, cd));
            _mm512_store_si512(parts[2], _mm512_unpacklo_epi64(ef, gh));
            _mm512_store_si512(parts[3], _mm512_unpackhi_epi64(ef, gh));
            UNROLL for (int k = 0; k < 4; k++) UNROLL for (int m = 0; m < 4; m++)
                memcpy(to + (4 * k + m) * STRIP, parts[m] + 8 * k, 16);
        }
    }
}
#endif

ALWAYS_INLINE void portable_strip_body(int16_t *y, const uint8_t *codes, int64_t tiles, const Decoding *d) {
    for (int64_t t = 0; t < tiles; t++, y += TILE_COLUMNS, codes += 256 * d->bits) {
        if (d->family == BIT_TRELLIS && d->bits == 2)
            bit_tile(y, codes, d->multipliers[0], 2);
        else if (d->family == BIT_TRELLIS && d->bits == 3)
            bit_tile(y, codes, d->multipliers[0], 3);
        else if (d->family == BIT_TRELLIS)
            bit_tile(y, codes, d->multipliers[0], 4);
        else if (d->bits == 2)
            byte_tile(y, codes, d->multipliers, 1);
        else
            byte_tile(y, codes, d->multipliers, 2);
    }
}
HF_LRQ_CLONES(static, portable_strip, (int16_t *y, const uint8_t *codes, int64_t tiles, const Decoding *d),
              (y, codes, tiles, d))

static void strip(int16_t *y, const uint8_t *codes, int64_t tiles, const Decoding *d) {
#if HF_LRQ_HAS_AVX512
    if (d->family == BYTE_TRELLIS && hf_lrq_isa() >= HF_LRQ_AVX512) {
        for (int64_t t = 0; t < tiles; t++, y += TILE_COLUMNS, codes += 256 * d->bits)
            byte_tile_avx512(y, codes, d->multipliers, d->bits / 2);
        return;
    }
#endif
    portable_strip(y, codes, tiles, d);
}

ALWAYS_INLINE void scale_body(float *restrict to, const int16_t *restrict y, float gain, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = gain * (float)y[i];
}
HF_LRQ_CLONES(static, scale, (float *to, const int16_t *y, float gain, int64_t n), (to, y, gain, n))

static void work(void *context) {
    Decoding *d = context;
    int64_t tiles = ceil_div(d->in_features, TILE_COLUMNS), blocks = ceil_div(d->rows, TILE_ROWS), block;
    int16_t y[TILE_ROWS * STRIP];
    float row[STRIP];
    while ((block = atomic_fetch_add(&d->next, 1)) < blocks) {
        const uint8_t *codes = d->codes + block * tiles * 256 * d->bits;
        int64_t rows = smaller(TILE_ROWS, d->rows - block * TILE_ROWS);
        for (int64_t first = 0; first < tiles; first += STRIP_TILES) {
            strip(y, codes + first * 256 * d->bits, smaller(STRIP_TILES, tiles - first), d);
            int64_t column = first * TILE_COLUMNS, count = smaller(STRIP, d->in_features - column);
            for (int64_t i = 0; i < rows; i++) {
                scale(row, y + i * STRIP, d->gain, count);
                hf_lrq_from_float(d->values, (block * TILE_ROWS + i) * d->in_features + column, row, count, (int)d->kind);
            }
        }
    }
}

/* values: [rows][in_features] of a kind of `floats.h`; codes: those of the block of 128 rows that the first row starts. */
HF_LRQ_EXPORT void hf_lrq_decode(const uint8_t *codes, void *values, int64_t rows, int64_t in_features, int64_t kind,
                                 int64_t family, int64_t bits, int64_t multiplier, int64_t second_multiplier,
                                 int64_t threads, double gain) {
    Decoding decoding = {.codes = codes,
                         .values = values,
                         .rows = rows,
                         .in_features = in_features,
                         .kind = kind,
                         .family = (int)family,
                         .bits = (int)bits,
                         .multipliers = {(uint32_t)multiplier, (uint32_t)second_multiplier},
                         .gain = (float)gain};
    hf_lrq_run(work, &decoding, (int)threads);
}
