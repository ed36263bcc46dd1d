/* The `int` codebook: a code c of `bits` bits means the odd number 2 c + 1 - 2^bits, times a gain and a scale.

A row of the matrix is its codes one after another, least significant bit first, filled up to 8 columns; it has one
scale for each `group_size` columns. Products are taken in units of 64 bytes of codes, 24 at 3 bits. */

#ifndef HF_LRQ_UNIFORM_H
#define HF_LRQ_UNIFORM_H

#include "activations.h"

enum { VECTOR = 64 };

typedef struct UniformMatrix {
    const uint8_t *codes; /* [rows][row_bytes] */
    const void *scales;   /* [rows][groups], of a kind of `floats.h` */
    int scales_kind, bits;
    int64_t row_bytes, groups, group_size; /* group_size: a multiple of 8, at 2 bits of 16 */
} UniformMatrix;

/* Vectors of 64 codes in a unit. */
static inline int vectors_of_unit(int bits) { return bits == 2 ? 4 : bits == 4 ? 2 : 1; }
static inline int unit_columns(int bits) { return VECTOR * vectors_of_unit(bits); }
static inline int unit_bytes(int bits) { return unit_columns(bits) * bits / 8; }

/* Where a kernel finds the integers of a token, unit after unit. In a unit, vector v of 64 has the columns whose codes
   are the v-th of each byte, in order (at 3 bits, all columns).

   UNIFORM_BYTES  int8 [digit][vector][64], then int32 [16]: (2^bits - 1) times the sum of the integers that meet in
                  a lane of 32 bits; if there are three digits, once for the first two and once for the last
   UNIFORM_WORDS  int16 [plane][vector][64] */
int64_t hf_lrq_uniform_unit_bytes(const Planes *planes);

static inline int64_t hf_lrq_uniform_token_bytes(const Planes *planes) {
    return planes->columns / unit_columns(planes->kernel->bits) * hf_lrq_uniform_unit_bytes(planes);
}

/* As `hf_lrq_planes_fill`, from integers [columns], which do not survive; scratch: [columns]. */
void hf_lrq_uniform_place(Planes *planes, int64_t token, int32_t *integers, int32_t *scratch);

/* to[token * stride + i] = sum of scale * odd number * integer over row first + i; also times the scales of the
   activations if they go by blocks. Returns 0, or -1 if memory ran out. */
int hf_lrq_uniform_portable(const Planes *planes, const UniformMatrix *matrix, float *to, int64_t stride, int64_t first,
                            int64_t rows);
#if HF_LRQ_X86
int hf_lrq_uniform_avx512(const Planes *planes, const UniformMatrix *matrix, float *to, int64_t stride, int64_t first,
                          int64_t rows);
#endif

/* The last `count` bytes of a row and zeros after them. */
static inline const uint8_t *filled_up(uint8_t *room, const uint8_t *from, int64_t count) {
    memset(room, 0, VECTOR);
    memcpy(room, from, (size_t)count);
    return room;
}

#endif
