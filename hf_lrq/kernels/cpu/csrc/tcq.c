/* The bit-step trellis: one product a weight. Two rows of a lane are `bits` words, so their windows lie at positions
   that the compiler knows. */

#include "tcq.h"

#include "bt.h"

#if HF_LRQ_HAS_AVX2
#include <immintrin.h>
#endif

/* The window of weight i of a pair of rows starts at bit 32 + (i + 1) * bits - 16 of the words (before, 0, 1, ...). */
#define START(BITS, I) (32 + ((I) + 1) * (BITS)-16)

#if HF_LRQ_HAS_AVX512
enum { AHEAD = 2048 };

AVX512_TARGET ALWAYS_INLINE __m512i window512(const __m512i *words, int start) {
    const __m512i mask = _mm512_set1_epi32(0xffff);
    __m512i word = words[start / 32];
    int shift = start % 32;
    if (shift == 16) return _mm512_srli_epi32(word, 16);
    if (shift == 0) return _mm512_and_si512(word, mask);
    word = _mm512_srli_epi32(word, (unsigned)shift);
    if (shift < 16) return _mm512_and_si512(word, mask);
    __m512i next = _mm512_slli_epi32(words[start / 32 + 1], (unsigned)(32 - shift));
    return _mm512_ternarylogic_epi32(word, next, mask, 0xa8); /* (word | next) & mask */
}

#define DOT512(NAME, BITS, PLANES)                                                                                     \
    AVX512_TARGET static void NAME(const uint8_t *codes, const int32_t *x, int64_t tiles, const uint32_t *multipliers, \
                                   int32_t *acc) {                                                                     \
        const __m512i m = _mm512_set1_epi32((int)multipliers[0]);                                                      \
        for (int pair = 0; pair < 4; pair++) {                                                                         \
            __m512i sum[2][PLANES];                                                                                    \
            UNROLL for (int p = 0; p < 2; p++)                                                                         \
                UNROLL for (int r = 0; r < PLANES; r++)                                                                \
                    sum[p][r] = _mm512_loadu_si512(acc + r * TILE_ROWS + (2 * pair + p) * LANES);                      \
            const uint8_t *tile = codes;                                                                               \
            const int32_t *xs = x;                                                                                     \
            for (int64_t t = tiles; t; t--, tile += 256 * BITS, xs += 16 * PLANES) {                                   \
                __m512i words[BITS + 1];                                                                               \
                words[0] = _mm512_loadu_si512(tile + 64 * ((pair * BITS + 4 * BITS - 1) % (4 * BITS)));                \
                UNROLL for (int w = 0; w < BITS; w++) {                                                                \
                    words[w + 1] = _mm512_loadu_si512(tile + 64 * (pair * BITS + w));                                  \
                    _mm_prefetch((const char *)tile + AHEAD + 64 * (pair * BITS + w), _MM_HINT_T0);                    \
                }                                                                                                      \
                UNROLL for (int i = 0; i < 32; i++) {                                                                  \
                    __m512i hash = _mm512_mullo_epi32(window512(words, START(BITS, i)), m);                            \
                    UNROLL for (int r = 0; r < PLANES; r++)                                                            \
                        sum[i / 16][r] = _mm512_dpbusd_epi32(sum[i / 16][r], hash,                                     \
                                                             _mm512_set1_epi32(xs[i % 16 * PLANES + r]));              \
                }                                                                                                      \
            }                                                                                                          \
            UNROLL for (int p = 0; p < 2; p++)                                                                         \
                UNROLL for (int r = 0; r < PLANES; r++)                                                                \
                    _mm512_storeu_si512(acc + r * TILE_ROWS + (2 * pair + p) * LANES, sum[p][r]);                      \
        }                                                                                                              \
    }

#define DOTS512(BITS)                                                                                                  \
    DOT512(dot##BITS##_1, BITS, 1)                                                                                     \
    DOT512(dot##BITS##_2, BITS, 2)                                                                                     \
    DOT512(dot##BITS##_4, BITS, 4)                                                                                     \
    DOT512(dot##BITS##_8, BITS, 8)                                                                                     \
    static void avx512_##BITS(DOT_PARAMETERS) {                                                                        \
        (void)all_tiles;                                                                                               \
        const int32_t *xs = (const int32_t *)x_planes + first_tile * 16 * planes;                                      \
        switch (planes) {                                                                                              \
            case 1: dot##BITS##_1(codes, xs, tiles, multipliers, acc); break;                                          \
            case 2: dot##BITS##_2(codes, xs, tiles, multipliers, acc); break;                                          \
            case 4: dot##BITS##_4(codes, xs, tiles, multipliers, acc); break;                                          \
            default: dot##BITS##_8(codes, xs, tiles, multipliers, acc);                                                \
        }                                                                                                              \
    }
DOTS512(2)
DOTS512(3)
DOTS512(4)

DotFunction hf_lrq_tcq_avx512(int bits) { return bits == 2 ? avx512_2 : bits == 3 ? avx512_3 : avx512_4; }
#endif

#if HF_LRQ_HAS_AVX2
AVX2_TARGET ALWAYS_INLINE __m256i sum256(const __m256i *words, int start, __m256i m) {
    __m256i word = _mm256_srli_epi32(words[start / 32], start % 32);
    if (start % 32 > 16) word = _mm256_or_si256(word, _mm256_slli_epi32(words[start / 32 + 1], 32 - start % 32));
    __m256i hash = _mm256_mullo_epi32(_mm256_and_si256(word, _mm256_set1_epi32(0xffff)), m);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(hash, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}

#define DOT256(BITS)                                                                                                   \
    AVX2_TARGET static void avx2_##BITS(DOT_PARAMETERS) {                                                              \
        (void)all_tiles;                                                                                               \
        const __m256i m = _mm256_set1_epi32((int)multipliers[0]);                                                      \
        for (int part = 0; part < 8; part++) {                                                                         \
            int pair = part / 2, half = part % 2 * 8;                                                                  \
            const uint8_t *tile = codes + half * 4;                                                                    \
            const int32_t *xs = (const int32_t *)x_planes + first_tile * 8 * planes;                                   \
            int32_t *to = acc + 2 * pair * LANES + half;                                                               \
            for (int64_t t = tiles; t; t--, tile += 256 * BITS, xs += 8 * planes) {                                    \
                __m256i words[BITS + 1];                                                                               \
                words[0] = LOAD(tile + 64 * ((pair * BITS + 4 * BITS - 1) % (4 * BITS)));                              \
                UNROLL for (int w = 0; w < BITS; w++) words[w + 1] = LOAD(tile + 64 * (pair * BITS + w));              \
                UNROLL for (int p = 0; p < 2; p++) {                                                                   \
                    __m256i y[8];                                                                                      \
                    UNROLL for (int i = 0; i < 8; i++)                                                                 \
                        y[i] = _mm256_or_si256(                                                                        \
                            sum256(words, START(BITS, 16 * p + 2 * i), m),                                             \
                            _mm256_slli_epi32(sum256(words, START(BITS, 16 * p + 2 * i + 1), m), 16));                 \
                    for (int r = 0; r < planes; r++) {                                                                 \
                        __m256i *sum = (__m256i *)(to + r * TILE_ROWS + p * LANES), s = _mm256_loadu_si256(sum);       \
                        UNROLL for (int i = 0; i < 8; i++)                                                             \
                            s = _mm256_add_epi32(s, _mm256_madd_epi16(y[i], _mm256_set1_epi32(xs[i * planes + r])));   \
                        _mm256_storeu_si256(sum, s);                                                                   \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
#define LOAD(at) _mm256_loadu_si256((const __m256i *)(at))
DOT256(2)
DOT256(3)
DOT256(4)

DotFunction hf_lrq_tcq_avx2(int bits) { return bits == 2 ? avx2_2 : bits == 3 ? avx2_3 : avx2_4; }
#endif

ALWAYS_INLINE void dot_scalar(DOT_PARAMETERS, int bits) {
    (void)all_tiles;
    const int32_t *xs = (const int32_t *)x_planes + first_tile * 8 * planes;
    for (int64_t t = 0; t < tiles; t++, codes += 256 * bits, xs += 8 * planes) {
        uint32_t words[17][LANES]; /* the last word once more in front */
        memcpy(words[1], codes, (size_t)(256 * bits));
        memcpy(words[0], words[4 * bits], sizeof words[0]);
        for (int p = 0; p < 8; p++)
            for (int i = 0; i < 8; i++) {
                uint32_t y[2][LANES];
                for (int k = 0; k < 2; k++) {
                    int start = START(bits, 16 * p + 2 * i + k), shift = start % 32;
                    const uint32_t *word = words[start / 32], *next = words[start / 32 + (shift > 16)];
                    for (int lane = 0; lane < LANES; lane++) {
                        uint32_t window = (word[lane] >> shift | (uint64_t)next[lane] << (32 - shift)) & 0xffff;
                        uint32_t hash = window * multipliers[0];
                        y[k][lane] = (hash & 255) + (hash >> 8 & 255) + (hash >> 16 & 255) + (hash >> 24);
                    }
                }
                for (int r = 0; r < planes; r++) {
                    int32_t pair = xs[i * planes + r];
                    uint32_t *to = (uint32_t *)acc + r * TILE_ROWS + p * LANES; /* unsigned: may wrap */
                    for (int lane = 0; lane < LANES; lane++)
                        to[lane] += (uint32_t)((int32_t)y[0][lane] * (int16_t)(pair & 0xffff)) +
                                    (uint32_t)((int32_t)y[1][lane] * (pair >> 16));
                }
            }
    }
}

static void scalar_2(DOT_PARAMETERS) { dot_scalar(codes, x_planes, first_tile, tiles, all_tiles, planes, multipliers, acc, 2); }
static void scalar_3(DOT_PARAMETERS) { dot_scalar(codes, x_planes, first_tile, tiles, all_tiles, planes, multipliers, acc, 3); }
static void scalar_4(DOT_PARAMETERS) { dot_scalar(codes, x_planes, first_tile, tiles, all_tiles, planes, multipliers, acc, 4); }

DotFunction hf_lrq_tcq_scalar(int bits) { return bits == 2 ? scalar_2 : bits == 3 ? scalar_3 : scalar_4; }
