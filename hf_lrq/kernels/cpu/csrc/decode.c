/* Stored codes to values, blocks of rows at a time. */

#include <stdatomic.h>

#include "floats.h"
#include "kernels.h"
#include "pool.h"

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
            for (int i = 0; i < TILE_COLUMNS; i++) y[(p * LANES + lane) * STRIP + i] = column[i][lane];
    }
}

ALWAYS_INLINE void strip_body(int16_t *y, const uint8_t *codes, int64_t tiles, const Decoding *d) {
    for (int64_t t = 0; t < tiles; t++, y += TILE_COLUMNS, codes += 256 * d->bits) {
        if (d->family == BIT_TRELLIS)
            bit_tile(y, codes, d->multipliers[0], d->bits);
        else if (d->bits == 2)
            byte_tile(y, codes, d->multipliers, 1);
        else
            byte_tile(y, codes, d->multipliers, 2);
    }
}
HF_LRQ_CLONES(static, strip, (int16_t *y, const uint8_t *codes, int64_t tiles, const Decoding *d), (y, codes, tiles, d))

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
