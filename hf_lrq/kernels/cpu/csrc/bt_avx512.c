/* The byte-step trellis with byte dot products (AVX-512 VNNI). */

#include "bt.h"

#if HF_LRQ_HAS_AVX512
#include <immintrin.h>

#define SHUFFLES(table, j) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table[j]))

enum { AHEAD = 2048, CHUNK = 32 }; /* bytes to prefetch ahead; tiles (16 KB at 2 bits) that stay in the first cache */

/* ROWS rows of a lane (of 8) for PLANES planes at a time: their sums stay in registers. */
#define DOT(NAME, WORDS, ROWS, PLANES)                                                                                 \
    AVX512_TARGET static void NAME(const uint8_t *codes, const int32_t *x, int64_t tiles, const uint32_t *multipliers, \
                                   int32_t *acc) {                                                                     \
        enum { ALL = 8 * WORDS };                                                                                      \
        const __m512i m1 = _mm512_set1_epi32((int)multipliers[0]), m2 = _mm512_set1_epi32((int)multipliers[1]);        \
        __m512i new_first[4], old_first[4];                                                                            \
        UNROLL for (int j = 0; j < 4; j++) new_first[j] = SHUFFLES(NEW_FIRST, j), old_first[j] = SHUFFLES(OLD_FIRST, j); \
        int64_t step = ROWS == 8 ? tiles : CHUNK;                                                                      \
        for (int64_t start = 0; start < tiles; start += step, codes += step * ALL * 64, x += step * 4 * WORDS * PLANES) \
            for (int first = 0; first < 8; first += ROWS) {                                                            \
                __m512i sum[ROWS][PLANES];                                                                             \
                UNROLL for (int p = 0; p < ROWS; p++)                                                                  \
                    UNROLL for (int r = 0; r < PLANES; r++)                                                            \
                        sum[p][r] = _mm512_loadu_si512(acc + r * TILE_ROWS + (first + p) * LANES);                     \
                const uint8_t *tile = codes;                                                                           \
                const int32_t *xs = x;                                                                                 \
                for (int64_t t = smaller(step, tiles - start); t; t--, tile += ALL * 64, xs += 4 * WORDS * PLANES) {   \
                    __m512i before = _mm512_loadu_si512(tile + 64 * ((first * WORDS + ALL - 1) % ALL));                \
                    UNROLL for (int q = 0; q < ROWS * WORDS; q++) {                                                    \
                        __m512i word = _mm512_loadu_si512(tile + 64 * (first * WORDS + q));                            \
                        _mm_prefetch((const char *)tile + AHEAD + 64 * (first * WORDS + q), _MM_HINT_T0);              \
                        __m512i start_of = _mm512_mask_blend_epi8(0x8888888888888888, word, before);                   \
                        before = word;                                                                                 \
                        UNROLL for (int j = 0; j < 4; j++) {                                                           \
                            __m512i source = j ? word : start_of;                                                      \
                            __m512i P = _mm512_mullo_epi32(_mm512_shuffle_epi8(source, new_first[j]), m1);             \
                            __m512i Q = _mm512_mullo_epi32(_mm512_shuffle_epi8(source, old_first[j]), m2);             \
                            UNROLL for (int r = 0; r < PLANES; r++) {                                                  \
                                __m512i v = _mm512_set1_epi32(xs[(q % WORDS * 4 + j) * PLANES + r]);                   \
                                sum[q / WORDS][r] = _mm512_dpbusd_epi32(sum[q / WORDS][r], P, v);                      \
                                sum[q / WORDS][r] = _mm512_dpbusd_epi32(sum[q / WORDS][r], Q, v);                      \
                            }                                                                                          \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
                UNROLL for (int p = 0; p < ROWS; p++)                                                                  \
                    UNROLL for (int r = 0; r < PLANES; r++)                                                            \
                        _mm512_storeu_si512(acc + r * TILE_ROWS + (first + p) * LANES, sum[p][r]);                     \
            }                                                                                                          \
    }

#define DOTS(WORDS)                                                                                                    \
    DOT(dot##WORDS##_1, WORDS, 8, 1)                                                                                   \
    DOT(dot##WORDS##_2, WORDS, 8, 2)                                                                                   \
    DOT(dot##WORDS##_3, WORDS, 4, 3)                                                                                   \
    DOT(dot##WORDS##_4, WORDS, 4, 4)                                                                                   \
    DOT(dot##WORDS##_6, WORDS, 4, 6)                                                                                   \
    DOT(dot##WORDS##_8, WORDS, 2, 8)                                                                                   \
    DOT(dot##WORDS##_12, WORDS, 2, 12)                                                                                 \
    void hf_lrq_bt##WORDS##_avx512(DOT_PARAMETERS) {                                                                   \
        (void)all_tiles;                                                                                               \
        const int32_t *xs = (const int32_t *)x_planes + first_tile * 4 * WORDS * planes;                                      \
        switch (planes) {                                                                                              \
            case 1: dot##WORDS##_1(codes, xs, tiles, multipliers, acc); break;                                         \
            case 2: dot##WORDS##_2(codes, xs, tiles, multipliers, acc); break;                                         \
            case 3: dot##WORDS##_3(codes, xs, tiles, multipliers, acc); break;                                         \
            case 4: dot##WORDS##_4(codes, xs, tiles, multipliers, acc); break;                                         \
            case 6: dot##WORDS##_6(codes, xs, tiles, multipliers, acc); break;                                         \
            case 8: dot##WORDS##_8(codes, xs, tiles, multipliers, acc); break;                                         \
            default: dot##WORDS##_12(codes, xs, tiles, multipliers, acc);                                              \
        }                                                                                                              \
    }
DOTS(1)
DOTS(2)

#endif
