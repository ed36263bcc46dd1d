/* The `int` codebook: a code c of `bits` bits means the odd number 2 c + 1 - 2^bits, times a gain and a scale.

A row of the matrix is its codes one after another, least significant bit first, filled up to 8 columns; it has one
scale for each `group_size` columns. Products are taken in units of 64 bytes of codes, 24 at 3 bits and 48 at 6. */

#ifndef HF_LRQ_UNIFORM_H
#define HF_LRQ_UNIFORM_H

#include "activations.h"

enum { VECTOR = 64, UNIFORM_BLOCK = 128, UNIFORM_BLOCK_BYTES = 2 * 1024 + 2 * 64 };

typedef struct UniformMatrix {
    const uint8_t *codes; /* [rows][row_bytes] */
    const void *scales;   /* [rows][groups], of a kind of `floats.h` */
    int scales_kind, bits;
    int64_t row_bytes, groups, group_size; /* group_size: a multiple of 8 */
} UniformMatrix;

/* Vectors of 64 codes in a unit. */
static inline int vectors_of_unit(int bits) { return bits == 2 ? 4 : bits == 4 ? 2 : 1; }
static inline int unit_columns(int bits) { return VECTOR * vectors_of_unit(bits); }
static inline int unit_bytes(int bits) { return unit_columns(bits) * bits / 8; }

/* Where a kernel finds the integers of a token, unit after unit. In a unit, vector v of 64 has the columns whose codes
   are the v-th of each byte, in order (at 3, 6 and 8 bits, all columns).

   UNIFORM_BYTES  int8 [digit][vector][64], then int32 [16]: (2^bits - 1) times the sum of the integers that meet in
                  a lane of 32 bits; if there are three digits, once for the first two and once for the last
   UNIFORM_WORDS  int16 [plane][vector][64]
   UNIFORM_TILES  For 16 planes and 128 columns: int8 [half][column / 4][plane][4], then float32 [16]: half of 2^bits - 1
                  times the sum of the integers, and float32 [16]: the scale of the activations, where it goes by
                  blocks. The halves are the even and odd columns at 4 bits and the first and the last 64 at 3 and 8;
                  at 2 bits, of 0, 1, 2, 3 modulo 4, (0, 1) and (2, 3) one after the other. */
int64_t hf_lrq_uniform_bytes(const Planes *planes);
int64_t hf_lrq_uniform_unit_bytes(const Planes *planes); /* not of tiles */

/* Columns that the integers are filled up to a multiple of. */
static inline int64_t hf_lrq_uniform_columns(const Kernel *kernel) {
    return kernel->arrangement == UNIFORM_TILES ? UNIFORM_BLOCK : unit_columns(kernel->bits);
}

/* As `hf_lrq_planes_fill`, from integers [columns], which do not survive; scratch: [columns]. */
void hf_lrq_uniform_place(Planes *planes, int64_t token, int32_t *integers, int32_t *scratch);

/* to[token * stride + i] = sum of scale * odd number * integer over row first + i; also times the scales of the
   activations if they go by blocks. Returns 0, or -1 if memory ran out. */
int hf_lrq_uniform_portable(const Planes *planes, const UniformMatrix *matrix, float *to, int64_t stride, int64_t first,
                            int64_t rows);
#if HF_LRQ_HAS_AVX2
int hf_lrq_uniform_avx2(const Planes *planes, const UniformMatrix *matrix, float *to, int64_t stride, int64_t first,
                        int64_t rows);
#endif
#if HF_LRQ_HAS_AVX512
/* Not 6 bits; the group size is a multiple of 64 at 3 bits and of 16 at the others. */
int hf_lrq_uniform_avx512(const Planes *planes, const UniformMatrix *matrix, float *to, int64_t stride, int64_t first,
                          int64_t rows);
#endif
#if HF_LRQ_HAS_AMX
/* Not 6 bits; the group size is a multiple of 128. */
int hf_lrq_uniform_amx(const Planes *planes, const UniformMatrix *matrix, float *to, int64_t stride, int64_t first,
                       int64_t rows);
#endif

/* Columns, a part of a unit or all of it, that surely have one scale. */
static inline int64_t hf_lrq_uniform_run(const UniformMatrix *matrix) {
    int64_t run = unit_columns(matrix->bits);
    while (matrix->group_size % run) run /= 2;
    return run;
}

static inline float hf_lrq_uniform_scale_of_x(const Planes *planes, int64_t token, int64_t column) {
    return planes->blocks ? planes->scales[token * hf_lrq_scales_of_token(planes) + column / SCALE_COLUMNS] : 1;
}

/* The last `count` bytes of a row and zeros after them. */
static inline const uint8_t *filled_up(uint8_t *room, const uint8_t *from, int64_t count) {
    memset(room, 0, VECTOR);
    memcpy(room, from, (size_t)count);
    return room;
}

/* Eight codes of 3 or 6 bits, one a byte. */
ALWAYS_INLINE uint64_t hf_lrq_eight_codes(const uint8_t *codes, const int bits) {
    uint64_t v = 0;
    for (int i = 0; i < bits; i++) v |= (uint64_t)codes[i] << 8 * i;
    if (bits == 3) {
        v = (v | v << 20) & 0x00000fff00000fff;
        v = (v | v << 10) & 0x003f003f003f003f;
        return (v | v << 5) & 0x0707070707070707;
    }
    v = (v & 0x0000000000ffffff) | (v & 0x0000ffffff000000) << 8;
    v = (v & 0x00000fff00000fff) | (v & 0x00fff00000fff000) << 4;
    return (v & 0x003f003f003f003f) | (v & 0x0fc00fc00fc00fc0) << 2;
}

/* Odd numbers of unit u of a row, in the order of UNIFORM_WORDS; to: [unit_columns]. */
ALWAYS_INLINE void hf_lrq_odd_numbers(int16_t *restrict to, const uint8_t *codes, int64_t u, int64_t row_bytes,
                                      const int bits) {
    uint8_t room[VECTOR], apart[VECTOR];
    int most = (1 << bits) - 1, size = unit_bytes(bits);
    int64_t left = row_bytes - u * size;
    codes = left < size ? filled_up(room, codes + u * size, left) : codes + u * size;
    if (bits == 3 || bits == 6) {
        for (int i = 0; i < 8; i++) {
            uint64_t eight = hf_lrq_eight_codes(codes + bits * i, bits);
            memcpy(apart + 8 * i, &eight, 8);
        }
        codes = apart;
    }
    for (int v = 0; v < vectors_of_unit(bits); v++)
        for (int i = 0; i < VECTOR; i++)
            to[v * VECTOR + i] = (int16_t)(2 * ((codes[i] >> v * bits) & most) - most);
}

#endif
