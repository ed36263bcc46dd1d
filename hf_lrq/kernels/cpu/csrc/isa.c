/* Which tier of kernels this processor, this system and this build can run. */

#include <stdatomic.h>

#include "common.h"

#if HF_LRQ_HAS_AVX2
#include <cpuid.h>

/* Not __builtin_cpu_supports: compilers differ in the names it knows and in whether its library is there. */
enum { EAX, EBX, ECX, EDX };

static int has(const unsigned *registers, int which, unsigned bits) { return (registers[which] & bits) == bits; }

#define BIT(n) (1u << (n))

/* States that the system saves when it switches threads. */
static unsigned saved_states(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}
#endif

#if HF_LRQ_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives the tile registers only to a process that asked for them. */
static int amx_permitted(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

static int detected(void) {
#if HF_LRQ_HAS_AVX2
    enum { FMA = 12, OSXSAVE = 27, AVX = 28, F16C = 29 };                     /* leaf 1, ecx */
    enum { AVX2 = 5, AVX512F = 16, AVX512DQ = 17, AVX512BW = 30, AVX512VL = 31 }; /* leaf 7, ebx */
    enum { AVX512VNNI = 11 };                                                 /* leaf 7, ecx */
    enum { AMX_TILE = 24, AMX_INT8 = 25 };                                    /* leaf 7, edx */
    unsigned one[4], seven[4];
    if (!__get_cpuid(1, &one[EAX], &one[EBX], &one[ECX], &one[EDX]) ||
        !__get_cpuid_count(7, 0, &seven[EAX], &seven[EBX], &seven[ECX], &seven[EDX]) ||
        !has(one, ECX, BIT(FMA) | BIT(OSXSAVE) | BIT(AVX) | BIT(F16C)) || !has(seven, EBX, BIT(AVX2)))
        return HF_LRQ_SCALAR;
    unsigned saved = saved_states();
    if ((saved & 0x6) != 0x6) return HF_LRQ_SCALAR;
    if (HF_LRQ_HIGHEST_TIER == HF_LRQ_AVX2 || (saved & 0xe0) != 0xe0 ||
        !has(seven, EBX, BIT(AVX512F) | BIT(AVX512DQ) | BIT(AVX512BW) | BIT(AVX512VL)) ||
        !has(seven, ECX, BIT(AVX512VNNI)))
        return HF_LRQ_AVX2;
#if HF_LRQ_HAS_AMX
    if ((saved & 0x60000) == 0x60000 && has(seven, EDX, BIT(AMX_TILE) | BIT(AMX_INT8)) && amx_permitted())
        return HF_LRQ_AMX;
#endif
    return HF_LRQ_AVX512;
#else
    return HF_LRQ_SCALAR;
#endif
}

static atomic_int best = -1, cap = HF_LRQ_AMX;

int hf_lrq_isa(void) {
    int tier = atomic_load_explicit(&best, memory_order_relaxed);
    if (tier < 0) atomic_store(&best, tier = detected());
    int limit = atomic_load_explicit(&cap, memory_order_relaxed);
    return tier < limit ? tier : limit;
}

/* Use no tier above `limit` from now on; returns the tier in use. */
HF_LRQ_EXPORT int32_t hf_lrq_limit_isa(int32_t limit) {
    atomic_store(&cap, limit);
    return hf_lrq_isa();
}

HF_LRQ_EXPORT int32_t hf_lrq_tier(void) { return hf_lrq_isa(); }
