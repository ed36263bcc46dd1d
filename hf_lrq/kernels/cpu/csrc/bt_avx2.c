/* The byte-step trellis in 16-bit arithmetic: AVX2, and plain C. */

#include "bt.h"

#if HF_LRQ_HAS_AVX2
#include <immintrin.h>

#define LOAD(at) _mm256_loadu_si256((const __m256i *)(at))
#define SHUFFLES(table, j) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table[j]))

/* 8 of the 16 lanes, and 4 of the 8 rows of a lane, at a time. */
#define DOT(NAME, WORDS, PLANES)                                                                                       \
    AVX2_TARGET static void NAME(const uint8_t *codes, const int32_t *x, int64_t tiles, const uint32_t *multipliers,   \
                                 int32_t *acc) {                                                                       \
        enum { ALL = 8 * WORDS, ROWS = 4 };                                                                            \
        const __m256i m1 = _mm256_set1_epi32((int)multipliers[0]), m2 = _mm256_set1_epi32((int)multipliers[1]);        \
        const __m256i low = _mm256_set1_epi32(0x00ff00ff);                                                             \
        for (int part = 0; part < 4; part++) {                                                                         \
            int first = part / 2 * ROWS, half = part % 2 * 8;                                                          \
            const uint8_t *tile = codes + half * 4;                                                                    \
            const int32_t *xs = x;                                                                                     \
            int32_t *to = acc + first * LANES + half;                                                                  \
            __m256i sum[ROWS][PLANES];                                                                                 \
            UNROLL for (int p = 0; p < ROWS; p++)                                                                      \
                UNROLL for (int r = 0; r < PLANES; r++) sum[p][r] = LOAD(to + r * TILE_ROWS + p * LANES);              \
            for (int64_t t = tiles; t; t--, tile += ALL * 64, xs += 8 * WORDS * PLANES) {                              \
                __m256i before = LOAD(tile + 64 * ((first * WORDS + ALL - 1) % ALL));                                  \
                UNROLL for (int q = 0; q < ROWS * WORDS; q++) {                                                        \
                    __m256i word = LOAD(tile + 64 * (first * WORDS + q));                                              \
                    __m256i start_of = _mm256_blendv_epi8(word, before, _mm256_set1_epi32((int)0xff000000));           \
                    before = word;                                                                                     \
                    UNROLL for (int j = 0; j < 4; j++) {                                                               \
                        __m256i source = j ? word : start_of;                                                          \
                        __m256i P = _mm256_shuffle_epi8(source, SHUFFLES(NEW_FIRST, j));                               \
                        __m256i Q = _mm256_shuffle_epi8(source, SHUFFLES(OLD_FIRST, j));                               \
                        P = _mm256_mullo_epi32(P, m1);                                                                 \
                        Q = _mm256_mullo_epi32(Q, m2);                                                                 \
                        __m256i even = _mm256_add_epi16(_mm256_and_si256(P, low), _mm256_and_si256(Q, low));           \
                        __m256i odd = _mm256_add_epi16(_mm256_srli_epi16(P, 8), _mm256_srli_epi16(Q, 8));              \
                        UNROLL for (int r = 0; r < PLANES; r++) {                                                      \
                            const int32_t *pair = xs + (q % WORDS * 4 + j) * 2 * PLANES + r;                           \
                            __m256i s = _mm256_madd_epi16(even, _mm256_set1_epi32(pair[0]));                           \
                            s = _mm256_add_epi32(s, _mm256_madd_epi16(odd, _mm256_set1_epi32(pair[PLANES])));          \
                            sum[q / WORDS][r] = _mm256_add_epi32(sum[q / WORDS][r], s);                                \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            UNROLL for (int p = 0; p < ROWS; p++)                                                                      \
                UNROLL for (int r = 0; r < PLANES; r++)                                                                \
                    _mm256_storeu_si256((__m256i *)(to + r * TILE_ROWS + p * LANES), sum[p][r]);                       \
        }                                                                                                              \
    }

#define DOTS(WORDS)                                                                                                    \
    DOT(dot##WORDS##_1, WORDS, 1)                                                                                      \
    DOT(dot##WORDS##_2, WORDS, 2)                                                                                      \
    void hf_lrq_bt##WORDS##_avx2(DOT_PARAMETERS) {                                                                     \
        (void)all_tiles;                                                                                               \
        const int32_t *xs = (const int32_t *)x_planes + first_tile * 8 * WORDS * planes;                                      \
        (planes == 1 ? dot##WORDS##_1 : dot##WORDS##_2)(codes, xs, tiles, multipliers, acc);                           \
    }
DOTS(1)
DOTS(2)
#endif

ALWAYS_INLINE int32_t product(uint32_t values, int32_t pair) {
    return (int32_t)(values & 0xffff) * (int16_t)(pair & 0xffff) + (int32_t)(values >> 16) * (pair >> 16);
}

ALWAYS_INLINE void dot_scalar(const uint8_t *codes, const int32_t *x, int64_t tiles, int planes,
                              const uint32_t *multipliers, int32_t *acc, int words) {
    int all = 8 * words;
    for (int64_t t = 0; t < tiles; t++, codes += all * 64, x += 8 * words * planes) {
        uint32_t word[16 * LANES];
        memcpy(word, codes, (size_t)all * 64);
        for (int q = 0; q < all; q++) {
            const uint32_t *now = word + q * LANES, *before = word + (q + all - 1) % all * LANES;
            for (int j = 0; j < 4; j++) {
                uint32_t even[LANES], odd[LANES];
                for (int lane = 0; lane < LANES; lane++) {
                    uint32_t b = now[lane] >> 8 * j & 255, a = j ? now[lane] >> (8 * j - 8) & 255 : before[lane] >> 24;
                    uint32_t P = (b | a << 8) * 0x10001u * multipliers[0], Q = (a | b << 8) * 0x10001u * multipliers[1];
                    even[lane] = (P & 0x00ff00ff) + (Q & 0x00ff00ff);
                    odd[lane] = (P >> 8 & 0x00ff00ff) + (Q >> 8 & 0x00ff00ff);
                }
                for (int r = 0; r < planes; r++) {
                    const int32_t *pair = x + (q % words * 4 + j) * 2 * planes + r;
                    uint32_t *to = (uint32_t *)acc + r * TILE_ROWS + q / words * LANES; /* unsigned: may wrap */
                    for (int lane = 0; lane < LANES; lane++)
                        to[lane] += (uint32_t)product(even[lane], pair[0]) + (uint32_t)product(odd[lane], pair[planes]);
                }
            }
        }
    }
}

void hf_lrq_bt1_scalar(DOT_PARAMETERS) {
    (void)all_tiles;
    dot_scalar(codes, (const int32_t *)x_planes + first_tile * 8 * planes, tiles, planes, multipliers, acc, 1);
}

void hf_lrq_bt2_scalar(DOT_PARAMETERS) {
    (void)all_tiles;
    dot_scalar(codes, (const int32_t *)x_planes + first_tile * 16 * planes, tiles, planes, multipliers, acc, 2);
}
