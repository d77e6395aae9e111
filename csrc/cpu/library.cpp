// What the library was built for, what this CPU can run of it, and the choice between the kernels.
#include "kernels.h"

int attention_avx512(const Attention &attention, int threads, Parallel parallel);

HART_EXPORT int hart_infer_cpu_interface() { return 1; }

HART_EXPORT int hart_infer_cpu_attention(const Attention *attention, int threads, Parallel parallel) {
    return attention_avx512(*attention, threads, parallel);
}
