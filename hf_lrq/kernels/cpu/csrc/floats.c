/* Floats of any stored kind to and from float32, and the block Hadamard transform. */

#include "floats.h"

#include <math.h>

#if HF_LRQ_HAS_AVX2
#include <immintrin.h>
#endif

ALWAYS_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

ALWAYS_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    /* 2^112 moves the exponent from one bias to the other, and makes subnormal numbers normal. */
    return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

static uint16_t to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to 2^16 or more */
    if (magnitude < 0x38800000) return (uint16_t)(sign | (uint32_t)lrintf(float_of(magnitude) * 0x1p24f));
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

ALWAYS_INLINE uint16_t to_bfloat(float value) {
    uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

#if HF_LRQ_HAS_AVX512
AVX512_TARGET static int64_t halves_avx512(float *to, const uint16_t *from, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + i))));
    return i;
}
#endif

#if HF_LRQ_HAS_AVX2
AVX2_TARGET static int64_t halves_avx2(float *to, const uint16_t *from, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    return i;
}

AVX2_TARGET static int64_t to_halves_avx2(uint16_t *to, const float *from, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
    return i;
}
#endif

static void halves_to_float(float *to, const uint16_t *from, int64_t n) {
    int64_t i = 0;
#if HF_LRQ_HAS_AVX512
    if (hf_lrq_isa() >= HF_LRQ_AVX512) i = halves_avx512(to, from, n);
#endif
#if HF_LRQ_HAS_AVX2
    if (hf_lrq_isa() == HF_LRQ_AVX2) i = halves_avx2(to, from, n);
#endif
    for (; i < n; i++) to[i] = from_half(from[i]);
}

static void halves_from_float(uint16_t *to, const float *from, int64_t n) {
    int64_t i = 0;
#if HF_LRQ_HAS_AVX2
    if (hf_lrq_isa() >= HF_LRQ_AVX2) i = to_halves_avx2(to, from, n);
#endif
    for (; i < n; i++) to[i] = to_half(from[i]);
}

ALWAYS_INLINE void widen_body(float *restrict to, const void *restrict source, int64_t n, int kind) {
    if (kind == BFLOAT16) {
        const uint16_t *from = source;
        for (int64_t i = 0; i < n; i++) to[i] = float_of((uint32_t)from[i] << 16);
    } else if (kind == INT8) {
        const int8_t *from = source;
        for (int64_t i = 0; i < n; i++) to[i] = from[i];
    } else if (kind == LOW_NIBBLES || kind == HIGH_NIBBLES) {
        const uint8_t *from = source;
        int shift = kind == HIGH_NIBBLES ? 4 : 0;
        for (int64_t i = 0; i < n; i++) to[i] = (float)(from[i] >> shift & 15) - 8;
    } else { /* FOUR_BITS */
        const uint8_t *from = source;
        for (int64_t i = 0; i < n / 2; i++) {
            to[2 * i] = (float)(from[i] & 15) - 8;
            to[2 * i + 1] = (float)(from[i] >> 4) - 8;
        }
        if (n % 2) to[n - 1] = (float)(from[n / 2] & 15) - 8;
    }
}
HF_LRQ_CLONES(static, widen, (float *to, const void *source, int64_t n, int kind), (to, source, n, kind))

ALWAYS_INLINE void to_bfloats_body(uint16_t *restrict to, const float *restrict from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = to_bfloat(from[i]);
}
HF_LRQ_CLONES(static, to_bfloats, (uint16_t *to, const float *from, int64_t n), (to, from, n))

void hf_lrq_to_float(float *to, const void *source, int64_t first, int64_t n, int kind) {
    if (kind == FLOAT32)
        memcpy(to, (const float *)source + first, (size_t)n * sizeof *to);
    else if (kind == FLOAT16)
        halves_to_float(to, (const uint16_t *)source + first, n);
    else if (kind == BFLOAT16)
        widen(to, (const uint16_t *)source + first, n, kind);
    else
        widen(to, (const uint8_t *)source + (kind == FOUR_BITS ? first / 2 : first), n, kind);
}

void hf_lrq_from_float(void *to, int64_t first, const float *from, int64_t n, int kind) {
    if (kind == FLOAT32)
        memcpy((float *)to + first, from, (size_t)n * sizeof *from);
    else if (kind == FLOAT16)
        halves_from_float((uint16_t *)to + first, from, n);
    else
        to_bfloats((uint16_t *)to + first, from, n);
}

ALWAYS_INLINE void hadamard_body(float *restrict x, int64_t n, int64_t block) {
    float norm = 1 / sqrtf((float)block);
    int64_t h = 1;
    if (block >= 8) { /* the first three passes in one, in registers */
        for (int64_t i = 0; i < n; i += 8) {
            float *v = x + i, a[8], b[8];
            for (int k = 0; k < 8; k += 2) a[k] = v[k] + v[k + 1], a[k + 1] = v[k] - v[k + 1];
            for (int k = 0; k < 2; k++)
                for (int m = 0; m < 8; m += 4) b[m + k] = a[m + k] + a[m + k + 2], b[m + k + 2] = a[m + k] - a[m + k + 2];
            for (int k = 0; k < 4; k++) v[k] = (b[k] + b[k + 4]) * norm, v[k + 4] = (b[k] - b[k + 4]) * norm;
        }
        h = 8;
    } else {
        for (int64_t i = 0; i < n; i++) x[i] *= norm;
    }
    for (; h < block; h *= 2)
        for (int64_t i = 0; i < n; i += 2 * h) {
            float *restrict low = x + i, *restrict high = x + i + h;
            for (int64_t j = 0; j < h; j++) {
                float a = low[j], b = high[j];
                low[j] = a + b;
                high[j] = a - b;
            }
        }
}

#if HF_LRQ_HAS_AVX512
/* The four passes inside a vector of 16. */
AVX512_TARGET static void hadamard_avx512(float *x, int64_t n, int64_t block) {
    __m512 norm = _mm512_set1_ps(1 / sqrtf((float)block));
    for (int64_t i = 0; i < n; i += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), norm), t;
        t = _mm512_permute_ps(v, 0xB1);
        v = _mm512_mask_sub_ps(_mm512_add_ps(v, t), 0xAAAA, t, v);
        t = _mm512_permute_ps(v, 0x4E);
        v = _mm512_mask_sub_ps(_mm512_add_ps(v, t), 0xCCCC, t, v);
        t = _mm512_shuffle_f32x4(v, v, 0xB1);
        v = _mm512_mask_sub_ps(_mm512_add_ps(v, t), 0xF0F0, t, v);
        t = _mm512_shuffle_f32x4(v, v, 0x4E);
        v = _mm512_mask_sub_ps(_mm512_add_ps(v, t), 0xFF00, t, v);
        _mm512_storeu_ps(x + i, v);
    }
    for (int64_t h = 16; h < block; h *= 2)
        for (int64_t i = 0; i < n; i += 2 * h)
            for (int64_t j = i; j < i + h; j += 16) {
                __m512 a = _mm512_loadu_ps(x + j), b = _mm512_loadu_ps(x + j + h);
                _mm512_storeu_ps(x + j, _mm512_add_ps(a, b));
                _mm512_storeu_ps(x + j + h, _mm512_sub_ps(a, b));
            }
}
#endif

#if HF_LRQ_HAS_AVX2
AVX2_TARGET static void hadamard_avx2(float *x, int64_t n, int64_t block) { hadamard_body(x, n, block); }
#endif

void hf_lrq_hadamard(float *x, int64_t n, int64_t block) {
    if (block == 1) return;
#if HF_LRQ_HAS_AVX512
    if (hf_lrq_isa() >= HF_LRQ_AVX512 && block >= 16) {
        hadamard_avx512(x, n, block);
        return;
    }
#endif
#if HF_LRQ_HAS_AVX2
    if (hf_lrq_isa() >= HF_LRQ_AVX2) {
        hadamard_avx2(x, n, block);
        return;
    }
#endif
    hadamard_body(x, n, block);
}
