/* Products of stored codes with integer activations.

A kernel takes rows of integers (`planes`: the digits of the activations of some tokens) and one block of 128 weight
rows, and adds sums over columns of raw(weight) * integer to acc[plane][128]. raw is what falls out of the decoder
without any subtraction; it exceeds y by a constant, which is made good afterwards with the sums of the integers:

    bt:  raw = P[v] + Q[v], offset 255, for virtual columns v, of which there are four a byte of the stream. At 2 bits
         they are the columns. At 4 bits, where y_0 and y_1 are +-1 combinations of four sums, the combinations are
         taken of the activations instead: (x0, x1) becomes (x0 + x1, x1 - x0, x0 - x1, -x0 - x1).
    tcq: raw = sum of four bytes, offset 510.

int32 sums wrap modulo 2^32, and are exact after the offset is made good if the true sum fits. */

#ifndef HF_LRQ_KERNELS_H
#define HF_LRQ_KERNELS_H

#include "common.h"

enum { BYTE_TRELLIS = 0, BIT_TRELLIS = 1, UNIFORM = 2 };
enum { TILE_ROWS = 128, TILE_COLUMNS = 16, LANES = 16 };

/* Where a kernel wants the integer of virtual column v of plane r:
   BYTES      int8, [v / 4][plane][v % 4]
   SPLAT      int8 four times, [column][plane][4]
   PAIRS      int16, [pair][plane][2], pairs (0, 2), (1, 3), (4, 6), (5, 7), ...
   NEIGHBOURS int16, [pair][plane][2], pairs (0, 1), (2, 3), ...
   TILES      int8, [plane / 16][v / 64][plane % 16][64]: the matrix unit's tiles
   UNIFORM_*  see `uniform.h` */
typedef enum { BYTES, SPLAT, PAIRS, NEIGHBOURS, TILES, UNIFORM_BYTES, UNIFORM_WORDS, UNIFORM_TILES } Arrangement;

typedef void (*DotFunction)(const uint8_t *codes, const void *x, int64_t first_tile, int64_t tiles, int64_t all_tiles,
                            int planes, const uint32_t *multipliers, int32_t *acc);

struct Planes;
struct UniformMatrix;
typedef int (*UniformFunction)(const struct Planes *planes, const struct UniformMatrix *matrix, float *to, int64_t stride,
                               int64_t first, int64_t rows);

typedef struct {
    DotFunction dot;         /* of the trellises */
    UniformFunction uniform; /* of `int`, which has nothing of what follows but digits; NULL for the others */
    Arrangement arrangement;
    int most_planes;      /* in one call */
    int bits;             /* of a code */
    int digit_bits;       /* of an integer: 8 or 16 */
    int tiles_at_a_time;  /* that cannot overflow; 0: any number */
    int virtual_columns;  /* of a tile */
    int32_t offset;       /* raw - y */
    int64_t tile_bytes;
} Kernel;

/* The kernel for codes of a family and so many planes at the current tier; group_size: of `int`. */
void hf_lrq_kernel(Kernel *kernel, int family, int bits, int64_t group_size, int64_t planes);

/* Planes that a call with at least `planes` takes; the rest is zeros. */
int hf_lrq_padded_planes(const Kernel *kernel, int planes);

/* y of rows [0, 128) of one tile: [128][16]. */
void hf_lrq_decode_tile(int16_t *y, const uint8_t *tile, int family, int bits, const uint32_t *multipliers);

#endif
