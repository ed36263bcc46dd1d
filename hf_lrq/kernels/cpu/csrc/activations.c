/* From rotated activations to the integers that a kernel multiplies. */

#include "activations.h"

#include <math.h>

#include "uniform.h"

int hf_lrq_planes_init(Planes *planes, const Kernel *kernel, int64_t tokens, int64_t tiles, int digits, int blocks) {
    memset(planes, 0, sizeof *planes);
    planes->kernel = kernel;
    planes->tokens = tokens;
    planes->tiles = tiles;
    planes->columns = tiles * kernel->virtual_columns;
    if (kernel->uniform)
        planes->columns = ceil_div(planes->columns, hf_lrq_uniform_columns(kernel)) * hf_lrq_uniform_columns(kernel);
    planes->digits = digits;
    planes->blocks = blocks;
    planes->token_planes = kernel->digit_bits == 8 ? digits : (digits + 1) / 2;
    for (int k = 0; k < planes->token_planes; k++) planes->factor[k] = k == 0 ? 1 : 256 * planes->factor[k - 1];
    int64_t all = tokens * planes->token_planes;
    planes->groups = (int)ceil_div(all, kernel->most_planes);
    planes->group_planes = (int)ceil_div(all, planes->groups);
    planes->padded_planes = hf_lrq_padded_planes(kernel, planes->group_planes);
    planes->chunk_tiles = blocks ? SCALE_TILES : tiles;
    if (kernel->tiles_at_a_time) planes->chunk_tiles = smaller(planes->chunk_tiles, kernel->tiles_at_a_time);
    planes->chunks = ceil_div(tiles, planes->chunk_tiles);
    switch (kernel->arrangement) {
        case BYTES: planes->plane_bytes = planes->columns; break;
        case SPLAT: planes->plane_bytes = 4 * planes->columns; break;
        case PAIRS:
        case NEIGHBOURS: planes->plane_bytes = 2 * planes->columns; break;
        case TILES: planes->plane_bytes = 64 * ceil_div(planes->columns, 64); break;
        default: break; /* planes lie together */
    }
    size_t bytes = kernel->uniform ? (size_t)hf_lrq_uniform_bytes(planes)
                                   : (size_t)(planes->plane_bytes * planes->groups * planes->padded_planes);
    planes->x = allocate(bytes);
    planes->scales = allocate((size_t)(tokens * hf_lrq_scales_of_token(planes)) * sizeof *planes->scales);
    planes->excess = allocate((size_t)(all * planes->chunks) * sizeof *planes->excess);
    if (!planes->x || !planes->scales || !planes->excess) {
        hf_lrq_planes_free(planes);
        return -1;
    }
    if (kernel->uniform || planes->groups * planes->padded_planes > all) memset(planes->x, 0, bytes);
    return 0;
}

void hf_lrq_planes_free(Planes *planes) {
    free(planes->x);
    free(planes->scales);
    free(planes->excess);
}

/* v: [2 n], see `kernels.h`. */
ALWAYS_INLINE void mix_body(float *restrict v, const float *restrict z, int64_t n) {
    for (int64_t i = 0; i < n / 2; i++) {
        float a = z[2 * i], b = z[2 * i + 1];
        v[4 * i] = a + b;
        v[4 * i + 1] = b - a;
        v[4 * i + 2] = a - b;
        v[4 * i + 3] = -a - b;
    }
}
HF_LRQ_CLONES(static, mix, (float *v, const float *z, int64_t n), (v, z, n))

/* The bits of a float without its sign order as its size does, and what is not a number comes last. */
ALWAYS_INLINE void largest_body(float *found, const float *restrict v, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, v + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    memcpy(found, &most, 4);
}
HF_LRQ_CLONES(static, largest, (float *found, const float *v, int64_t n), (found, v, n))

/* Halves go away from zero: as many up as down. */
ALWAYS_INLINE void round_to_integers_body(int32_t *restrict to, const float *restrict v, float inverse, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float value = v[i] * inverse;
        to[i] = (int32_t)(value + (value < 0 ? -0.5f : 0.5f));
    }
}
HF_LRQ_CLONES(static, round_to_integers, (int32_t *to, const float *v, float inverse, int64_t n), (to, v, inverse, n))

/* The lowest digit to `low`, the rest stays. */
ALWAYS_INLINE void split_body(int8_t *restrict low, int32_t *restrict integers, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        low[i] = (int8_t)integers[i];
        integers[i] = (integers[i] + 128) >> 8;
    }
}
HF_LRQ_CLONES(static, split, (int8_t *low, int32_t *integers, int64_t n), (low, integers, n))

ALWAYS_INLINE void sum_bytes_body(int32_t *found, const int8_t *restrict v, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += v[i];
    *found = sum;
}
HF_LRQ_CLONES(static, sum_bytes, (int32_t *found, const int8_t *v, int64_t n), (found, v, n))

ALWAYS_INLINE void sum_words_body(int32_t *found, const int32_t *restrict v, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += v[i];
    *found = sum;
}
HF_LRQ_CLONES(static, sum_words, (int32_t *found, const int32_t *v, int64_t n), (found, v, n))

static void place_bytes(const Planes *planes, uint8_t *group, int plane, const int8_t *digits) {
    int64_t n = planes->columns, width = planes->padded_planes;
    uint32_t *to = (uint32_t *)group + plane;
    switch (planes->kernel->arrangement) {
        case BYTES:
            for (int64_t i = 0; i < n / 4; i++) memcpy(to + i * width, digits + 4 * i, 4);
            break;
        case SPLAT:
            for (int64_t i = 0; i < n; i++) to[i * width] = (uint8_t)digits[i] * 0x01010101u;
            break;
        default: { /* TILES */
            int64_t blocks = planes->plane_bytes / 64, units = ceil_div(width, 16), rows = width / units;
            uint8_t *at = group + (plane / rows * blocks * rows + plane % rows) * 64;
            for (int64_t k = 0; k < blocks; k++, at += rows * 64, digits += 64) {
                int64_t count = smaller(64, n - 64 * k);
                memcpy(at, digits, (size_t)count);
                memset(at + count, 0, (size_t)(64 - count));
            }
        }
    }
}

static void place_words(const Planes *planes, uint8_t *group, int plane, const int32_t *integers) {
    int64_t n = planes->columns, width = planes->padded_planes;
    uint32_t *to = (uint32_t *)group + plane;
    int apart = planes->kernel->arrangement == PAIRS ? 2 : 1;
    for (int64_t i = 0; i < n / 2; i++) {
        int64_t first = apart == 1 ? 2 * i : i / 2 * 4 + i % 2;
        to[i * width] = (uint16_t)integers[first] | (uint32_t)(uint16_t)integers[first + apart] << 16;
    }
}

static uint32_t *excess_of(const Planes *planes, int64_t plane) { return planes->excess + plane * planes->chunks; }

/* Digit planes of a token from its integers. */
static void place(Planes *planes, int64_t token, int32_t *integers, int8_t *digits) {
    int64_t n = planes->columns, chunk = planes->chunk_tiles * planes->kernel->virtual_columns;
    for (int k = 0; k < planes->token_planes; k++) {
        int64_t plane = token * planes->token_planes + k, group = plane / planes->group_planes;
        uint8_t *at = planes->x + group * planes->padded_planes * planes->plane_bytes;
        int wide = planes->kernel->digit_bits == 16 && k + 1 == planes->token_planes;
        if (wide) {
            place_words(planes, at, (int)(plane % planes->group_planes), integers);
        } else {
            split(digits, integers, n);
            if (planes->kernel->digit_bits == 16) {
                int32_t *low = (int32_t *)(void *)(digits + n); /* scratch behind the digits */
                for (int64_t i = 0; i < n; i++) low[i] = digits[i];
                place_words(planes, at, (int)(plane % planes->group_planes), low);
            } else {
                place_bytes(planes, at, (int)(plane % planes->group_planes), digits);
            }
        }
        for (int64_t c = 0; c < planes->chunks; c++) {
            int64_t first = c * chunk, count = smaller(chunk, n - first);
            int32_t sum;
            if (wide)
                sum_words(&sum, integers + first, count);
            else
                sum_bytes(&sum, digits + first, count);
            excess_of(planes, plane)[c] = (uint32_t)planes->kernel->offset * (uint32_t)sum;
        }
    }
}

void hf_lrq_planes_fill(Planes *planes, int64_t token, const float *z, int32_t *integers) {
    static const float LARGEST[] = {127, 32639, 8355700}; /* the last one less the error of its product */
    int64_t n = planes->kernel->uniform ? planes->tiles * TILE_COLUMNS : planes->columns;
    int64_t count = hf_lrq_scales_of_token(planes);
    int64_t block = planes->blocks ? SCALE_TILES * planes->kernel->virtual_columns : n;
    int8_t *digits = (int8_t *)(integers + n);
    const float *v = z;
    if (n > planes->tiles * TILE_COLUMNS) {
        float *mixed = (float *)(integers + 3 * n);
        mix(mixed, z, n / 2);
        v = mixed;
    }
    for (int64_t b = 0; b < count; b++) {
        int64_t size = smaller(block, n - b * block);
        float most, top = LARGEST[planes->digits - 1];
        largest(&most, v + b * block, size);
        float *scale = planes->scales + token * count + b, inverse = top / most;
        if (most < INFINITY && inverse < INFINITY) {
            *scale = most / top;
            round_to_integers(integers + b * block, v + b * block, inverse, size);
        } else { /* zero, or so small that it may as well be; what is not finite spoils its token, as in any product */
            *scale = most < INFINITY ? 0 : NAN;
            memset(integers + b * block, 0, (size_t)size * sizeof *integers);
        }
    }
    if (planes->kernel->uniform) {
        memset(integers + n, 0, (size_t)(planes->columns - n) * sizeof *integers);
        hf_lrq_uniform_place(planes, token, integers, integers + planes->columns);
    } else {
        place(planes, token, integers, digits);
    }
}
