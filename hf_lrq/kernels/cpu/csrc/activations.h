/* From rotated activations to the integers that a kernel multiplies. */

#ifndef HF_LRQ_ACTIVATIONS_H
#define HF_LRQ_ACTIVATIONS_H

#include "kernels.h"

enum { SCALE_COLUMNS = 256, SCALE_TILES = SCALE_COLUMNS / TILE_COLUMNS };

/* The integers of some tokens: z is about scale * sum_k 256^k plane_k.

   `digits` 8-bit digits hold an integer of up to 127 * (256^digits - 1) / 255. They are stored as one plane each or,
   where the kernel multiplies 16 bits, two in a plane. There is one scale a token or, if `blocks`, one for each 256
   columns. Planes are cut into groups, as many as the kernel takes in one call. */
typedef struct Planes {
    const Kernel *kernel;
    int64_t tokens, tiles, columns; /* virtual columns, padding included; of `int`, whole units */
    int digits, token_planes, blocks;
    int groups, group_planes, padded_planes; /* per group: planes with content, and with padding */
    int64_t chunk_tiles, chunks;             /* tiles after which sums must be taken, and how often that is */
    int64_t plane_bytes;
    float factor[3];  /* of a token's planes */
    uint8_t *x;       /* [group], arranged as the kernel wants it */
    float *scales;    /* [token][ceil(tiles / 16)] if blocks, else [token] */
    uint32_t *excess; /* [token * token_planes][chunk]: offset * sum of the integers, modulo 2^32 */
} Planes;

/* Sizes, and memory for x, scales and excess; 0, or -1 if memory ran out. */
int hf_lrq_planes_init(Planes *planes, const Kernel *kernel, int64_t tokens, int64_t tiles, int digits, int blocks);
void hf_lrq_planes_free(Planes *planes);

static inline int64_t hf_lrq_scales_of_token(const Planes *planes) {
    return planes->blocks ? ceil_div(planes->tiles, SCALE_TILES) : 1;
}

/* Fill in one token. z: [tiles * 16] float32, zero in the padding; integers: scratch, [4 * columns] int32. */
void hf_lrq_planes_fill(Planes *planes, int64_t token, const float *z, int32_t *integers);

#endif
