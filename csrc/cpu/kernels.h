// The plain C interface of the CPU's kernels, and what they share. Included before any vector code, so it needs none.
#pragma once

#include <stdint.h>

#define HART_EXPORT extern "C" __attribute__((visibility("default")))

// GOMP_parallel of the OpenMP runtime that PyTorch loaded: calls work(context) in `threads` threads and waits for them.
// With it the kernels' threads are PyTorch's own, and no second pool competes for the cores.
typedef void (*Parallel)(void (*work)(void *), void *context, unsigned threads, unsigned flags);

// bf16 tensor [rows, heads, tokens, width] with strides in elements; the width's is 1.
struct Operand {
    const uint16_t *data;
    int64_t row, head, token;
};

// See `hart_infer/ops/attention.py`. `ranges`: pairs of start and stop, at least one, none empty.
struct Attention {
    Operand q, k, v;
    uint16_t *out;  // [rows, queries, heads * head_dim], contiguous
    int64_t rows, heads, queries, head_dim;
    const int64_t *ranges;
    int64_t num_ranges;
    float scale_log2;  // the softmax scale times log2(e), above 0
    float bonus;       // log2 of the multiplicity of the first range's keys
};
