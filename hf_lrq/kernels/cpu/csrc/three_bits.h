/* Codes of 3 bits in vectors. */

#ifndef HF_LRQ_THREE_BITS_H
#define HF_LRQ_THREE_BITS_H

#include <immintrin.h>

#include "common.h"

/* 64 codes of 3 bits, one a byte; 32 bytes are read. Eight codes are three bytes: first they go to where eight are to be,
   then two codes to each 16 bits. */
AVX512_TARGET ALWAYS_INLINE __m512i hf_lrq_three_bits(const uint8_t *codes) {
    const __m512i words = _mm512_set_epi16(0, 11, 10, 9, 0, 11, 10, 9, 0, 8, 7, 6, 0, 8, 7, 6, 0, 5, 4, 3, 0, 5, 4, 3, 0, 2,
                                           1, 0, 0, 2, 1, 0);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 1, 2, 2, -1, 3, 4, 3, 4, 4, 5, 5, -1));
    __m512i v = _mm512_permutexvar_epi16(words, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)codes)));
    v = _mm512_srlv_epi16(_mm512_shuffle_epi8(v, bytes), _mm512_set1_epi64(0x0002000400060000));
    return _mm512_ternarylogic_epi32(_mm512_and_si512(v, _mm512_set1_epi16(7)), _mm512_slli_epi16(v, 5),
                                     _mm512_set1_epi16(0x700), 0xf8); /* a | b & c */
}

#endif
