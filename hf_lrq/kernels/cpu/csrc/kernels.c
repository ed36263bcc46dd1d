/* Which kernel runs at which tier. */

#include "kernels.h"

#include "bt.h"
#include "tcq.h"
#include "uniform.h"

/* Below, byte dot products are faster. */
enum { UNIFORM_PLANES_FOR_TILES = 4 };

static void choose_bytes(Kernel *kernel, int bits, int64_t planes) {
    int wide = bits == 4, isa = hf_lrq_isa();
    (void)planes;
    kernel->virtual_columns = wide ? 2 * TILE_COLUMNS : TILE_COLUMNS;
    kernel->offset = 255;
#if HF_LRQ_HAS_AMX
    if (isa >= HF_LRQ_AMX && planes > 1) {
        kernel->dot = wide ? hf_lrq_bt2_amx : hf_lrq_bt1_amx;
        kernel->arrangement = TILES;
        kernel->most_planes = 64;
        return;
    }
#endif
#if HF_LRQ_HAS_AVX512
    if (isa >= HF_LRQ_AVX512) {
        kernel->dot = wide ? hf_lrq_bt2_avx512 : hf_lrq_bt1_avx512;
        kernel->arrangement = BYTES;
        kernel->most_planes = 12;
        return;
    }
#endif
    kernel->dot = wide ? hf_lrq_bt2_scalar : hf_lrq_bt1_scalar;
#if HF_LRQ_HAS_AVX2
    if (isa >= HF_LRQ_AVX2) kernel->dot = wide ? hf_lrq_bt2_avx2 : hf_lrq_bt1_avx2;
#endif
    (void)isa;
    kernel->arrangement = PAIRS;
    kernel->digit_bits = 16;
    kernel->most_planes = 2;
    /* 256 products of 255 and 127 * 257 stay below 2^31. */
    kernel->tiles_at_a_time = 256 / kernel->virtual_columns;
}

static void choose_bits(Kernel *kernel, int bits) {
    int isa = hf_lrq_isa();
    kernel->virtual_columns = TILE_COLUMNS;
    kernel->offset = 510;
#if HF_LRQ_HAS_AVX512
    if (isa >= HF_LRQ_AVX512) {
        kernel->dot = hf_lrq_tcq_avx512(bits);
        kernel->arrangement = SPLAT;
        kernel->most_planes = 8;
        return;
    }
#endif
    kernel->dot = hf_lrq_tcq_scalar(bits);
#if HF_LRQ_HAS_AVX2
    if (isa >= HF_LRQ_AVX2) kernel->dot = hf_lrq_tcq_avx2(bits);
#endif
    (void)isa;
    kernel->arrangement = NEIGHBOURS;
    kernel->digit_bits = 16;
    kernel->most_planes = 8;
    kernel->tiles_at_a_time = 128 / TILE_COLUMNS; /* 128 products of 510 and 127 * 257 */
}

static void choose_uniform(Kernel *kernel, int bits, int64_t group_size, int64_t planes) {
    int isa = hf_lrq_isa();
    (void)bits, (void)group_size, (void)planes, (void)isa;
    kernel->virtual_columns = TILE_COLUMNS;
    kernel->most_planes = 1;
#if HF_LRQ_HAS_AMX
    if (isa >= HF_LRQ_AMX && bits != 6 && planes >= UNIFORM_PLANES_FOR_TILES && group_size % UNIFORM_BLOCK == 0) {
        kernel->uniform = hf_lrq_uniform_amx;
        kernel->arrangement = UNIFORM_TILES;
        return;
    }
#endif
#if HF_LRQ_HAS_AVX512
    if (isa >= HF_LRQ_AVX512 && bits != 6 && group_size % (bits == 3 ? VECTOR : TILE_COLUMNS) == 0) {
        kernel->uniform = hf_lrq_uniform_avx512;
        kernel->arrangement = UNIFORM_BYTES;
        return;
    }
#endif
    kernel->uniform = hf_lrq_uniform_portable;
#if HF_LRQ_HAS_AVX2
    if (isa >= HF_LRQ_AVX2) kernel->uniform = hf_lrq_uniform_avx2;
#endif
    kernel->arrangement = UNIFORM_WORDS;
    kernel->digit_bits = 16;
}

void hf_lrq_kernel(Kernel *kernel, int family, int bits, int64_t group_size, int64_t planes) {
    *kernel = (Kernel){.bits = bits, .digit_bits = 8, .tile_bytes = 256 * bits};
    if (family == BYTE_TRELLIS)
        choose_bytes(kernel, bits, planes);
    else if (family == BIT_TRELLIS)
        choose_bits(kernel, bits);
    else
        choose_uniform(kernel, bits, group_size, planes);
}

int hf_lrq_padded_planes(const Kernel *kernel, int planes) {
    static const int BYTE_SIZES[] = {1, 2, 3, 4, 6, 8, 12}, SPLAT_SIZES[] = {1, 2, 4, 8};
    if (kernel->arrangement == TILES) {
        int units = (planes + 15) / 16;
        return (planes + units - 1) / units * units;
    }
    const int *size = kernel->arrangement == BYTES ? BYTE_SIZES : SPLAT_SIZES;
    if (kernel->digit_bits == 16) return planes;
    while (*size < planes) size++;
    return *size;
}
