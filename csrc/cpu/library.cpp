// The version of the interface, and the choice between kernels for one operation.
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels.h"

int attention_avx512(const Attention &attention, Threads threads);
int attention_amx(const Attention &attention, Threads threads);

HART_EXPORT int hart_infer_cpu_interface() { return 4; }

// Ask Linux for AMX's tiles, which it gives to a process only on request; 1 if it does.
HART_EXPORT int hart_infer_cpu_ask_for_tiles() {
#ifdef HART_AMX_EMULATED
    return 1;
#else
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#endif
}

HART_EXPORT int hart_infer_cpu_attention(const Attention *attention, int threads, Parallel parallel) {
    return (attention->tiles ? attention_amx : attention_avx512)(*attention, {threads, parallel});
}
