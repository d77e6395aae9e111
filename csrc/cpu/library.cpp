// The version of the interface, and the choice between kernels for one operation.
#include "kernels.h"

int attention_avx512(const Attention &attention, Threads threads);

HART_EXPORT int hart_infer_cpu_interface() { return 1; }

HART_EXPORT int hart_infer_cpu_attention(const Attention *attention, int threads, Parallel parallel) {
    return attention_avx512(*attention, {threads, parallel});
}
