/* What all files of the CPU kernels share: exports, targets, tiers, and small helpers. */

#ifndef HF_LRQ_COMMON_H
#define HF_LRQ_COMMON_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The highest tier that is compiled. */
#ifndef HF_LRQ_HIGHEST_TIER
#define HF_LRQ_HIGHEST_TIER 3
#endif

#ifdef __x86_64__
#define HF_LRQ_HAS_AVX2 (HF_LRQ_HIGHEST_TIER >= 1)
#define HF_LRQ_HAS_AVX512 (HF_LRQ_HIGHEST_TIER >= 2)
#else
#define HF_LRQ_HAS_AVX2 0
#define HF_LRQ_HAS_AVX512 0
#endif

#if defined(__x86_64__) && defined(__linux__)
#define HF_LRQ_HAS_AMX (HF_LRQ_HIGHEST_TIER >= 3)
#else
#define HF_LRQ_HAS_AMX 0
#endif

#define HF_LRQ_EXPORT __attribute__((visibility("default")))
#define HF_LRQ_TARGET(features) __attribute__((target(features)))
#define AVX2_TARGET HF_LRQ_TARGET("avx2,fma,f16c")
#define AVX512_TARGET HF_LRQ_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define AMX_TARGET HF_LRQ_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")
#define ALWAYS_INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("nounroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#define ROLLED _Pragma("GCC unroll 1") /* or the compiler takes seconds, and what it makes of it is slower */
#endif

enum { HF_LRQ_SCALAR = 0, HF_LRQ_AVX2 = 1, HF_LRQ_AVX512 = 2, HF_LRQ_AMX = 3 };

/* The best tier that the processor and the system allow, or a lower one that was asked for. */
int hf_lrq_isa(void);

/* Define `linkage void name params`, which runs `name_body args` compiled for the tier at hand. The body is plain C. */
#if HF_LRQ_HAS_AVX512
#define HF_LRQ_CLONES(linkage, name, params, args)                                                                            \
    AVX512_TARGET static void name##_avx512 params { name##_body args; }                                               \
    AVX2_TARGET static void name##_avx2 params { name##_body args; }                                                   \
    linkage void name params {                                                                                               \
        int isa = hf_lrq_isa();                                                                                        \
        if (isa >= HF_LRQ_AVX512)                                                                                      \
            name##_avx512 args;                                                                                        \
        else if (isa >= HF_LRQ_AVX2)                                                                                   \
            name##_avx2 args;                                                                                          \
        else                                                                                                           \
            name##_body args;                                                                                          \
    }
#elif HF_LRQ_HAS_AVX2
#define HF_LRQ_CLONES(linkage, name, params, args)                                                                            \
    AVX2_TARGET static void name##_avx2 params { name##_body args; }                                                   \
    linkage void name params {                                                                                               \
        if (hf_lrq_isa() >= HF_LRQ_AVX2)                                                                               \
            name##_avx2 args;                                                                                          \
        else                                                                                                           \
            name##_body args;                                                                                          \
    }
#else
#define HF_LRQ_CLONES(linkage, name, params, args)                                                                            \
    linkage void name params { name##_body args; }
#endif

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Memory of cache lines, or NULL. With HF_LRQ_POISON every byte is 255, so that what nobody wrote reads as NaN. */
static inline void *allocate(size_t bytes) {
    bytes = (bytes + 127) / 64 * 64;
    void *memory = aligned_alloc(64, bytes);
#ifdef HF_LRQ_POISON
    if (memory) memset(memory, 255, bytes);
#endif
    return memory;
}

#endif
