/* Which tier of kernels this processor, this system and this build can run. */

#include <stdatomic.h>

#include "common.h"

#if HF_LRQ_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives the tile registers only to a process that asked for them. */
static int amx_permitted(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static int amx_present(void) {
    unsigned eax = 7, ebx, ecx = 0, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    unsigned tile = 1u << 24, int8 = 1u << 25;
    return (edx & (tile | int8)) == (tile | int8);
}
#endif

static int detected(void) {
#if HF_LRQ_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return HF_LRQ_SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vnni"))
        return HF_LRQ_AVX2;
#if HF_LRQ_HAS_AMX
    if (amx_present() && amx_permitted()) return HF_LRQ_AMX;
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
