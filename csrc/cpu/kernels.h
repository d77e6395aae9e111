// The plain C interface of the CPU's kernels, and how they share out work. Included before any vector code, so it needs none.
#pragma once

#include <stdint.h>

#define HART_EXPORT extern "C" __attribute__((visibility("default")))

// GOMP_parallel of the OpenMP runtime that PyTorch loaded: calls work(context) in `threads` threads and waits for them.
// With it the kernels' threads are PyTorch's own, and no second pool competes for the cores.
typedef void (*Parallel)(void (*work)(void *), void *context, unsigned threads, unsigned flags);

struct Threads {
    int count;
    Parallel parallel;  // null: one thread
};

// bf16 tensor [rows, heads, tokens, width] with strides in elements; the width's is 1.
struct Operand {
    const uint16_t *data;
    int64_t row, head, token;
};

struct Result {
    uint16_t *data;
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
    int32_t tiles;     // 1 for AMX, where the CPU has it and Linux gave it
};

// See `hart_infer/ops/rms_norm.py`. All contiguous; `update` and `total` are null where nothing is added.
struct RmsNorm {
    const uint16_t *x, *update, *weight;
    uint16_t *total, *out;
    int64_t rows, width;
    float eps;
};

// See `hart_infer/ops/layer_norm_modulate.py`: x [groups, rows, width], contiguous, as are `update`, `total` and `out`; `gate`,
// `scale` and `shift` are bf16 with strides of their own, 0 where a dimension is shared. `update`, `gate` and `total` are null
// where nothing is added, `weight` and `bias` [width] where the norm has none.
struct Rows {
    const uint16_t *data;
    int64_t group, row;
};

struct LayerNorm {
    const uint16_t *x, *update, *weight, *bias;
    Rows gate, scale, shift;
    uint16_t *total, *out;
    int64_t groups, rows, width;
    float eps;
};

// See `hart_infer/ops/swiglu.py`. All contiguous.
struct Swiglu {
    const uint16_t *gate, *up;
    uint16_t *out;
    int64_t rows, width;
};

// See `hart_infer/ops/gelu_tanh.py`. Contiguous.
struct GeluTanh {
    const uint16_t *x;
    uint16_t *out;
    int64_t rows, width;
};

// See `hart_infer/ops/rope_cache.py`. q, k, v are the parts of qkv; all heads share the tables; `gains` is null without norms.
struct RopeCache {
    Operand q, k, v, cos, sin;
    Result rotated, keys, values;
    const uint16_t *gains;
    int64_t rows, heads, tokens, head_dim;
};

// See `hart_infer/ops/logits.py`. Contiguous.
struct Filter {
    float *logits;  // [rows, width]
    int64_t rows, width, top_k;  // 0: no top-k
    int32_t has_top_p;
    float removable;
};

// What the state of a torch.Generator of the CPU begins with: a Mersenne Twister (MT19937) of 624 words of 32 bits.
struct Twister {
    uint64_t seed;
    int32_t left, seeded;   // `left`: 1 when all words are used up, else one more than are not
    uint64_t next;          // place of the next word
    uint64_t words[624];
};

// See `hart_infer/ops/exponential.py`.
struct Exponential {
    Twister *state;
    float *out;  // [count]
    int64_t count;
};

// See `hart_infer/ops/int8_linear.py`. All contiguous; `levels` [rows, in] and `row_scales` [rows] are room to work in.
struct Int8Linear {
    const uint16_t *x;
    const int8_t *weight;        // [panels][in / 4][32 outputs][4 inputs]
    const float *scale;          // of each output
    const int32_t *weight_sums;  // of each output
    const uint16_t *bias;        // or null
    uint8_t *levels;
    float *row_scales;
    uint16_t *out;
    int64_t rows, in, out_width;
};

namespace {

// Numbers of tasks, each given out once; threads take them as they come.
struct Tasks {
    int64_t next, total;
    // The next one, or -1.
    int64_t take() {
        const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        return task < total ? task : -1;
    }
};

template <class Work>
struct Shared {
    Tasks tasks;
    const Work *work;
    int failed;
    static void run(void *context) {
        Shared &shared = *(Shared *)context;
        if ((*shared.work)(shared.tasks)) __atomic_store_n(&shared.failed, 1, __ATOMIC_RELAXED);
    }
};

// Call work(tasks) in every thread: it takes tasks until there are none, and returns 0, or 1 if it failed. 1 if one did.
template <class Work>
int share_out(int64_t total, Threads threads, const Work &work) {
    Shared<Work> shared = {{0, total}, &work, 0};
    const int64_t count = total < threads.count ? total : threads.count;
    if (threads.parallel && count > 1)
        threads.parallel(Shared<Work>::run, &shared, (unsigned)count, 0);
    else
        Shared<Work>::run(&shared);
    return shared.failed;
}

constexpr int64_t TASK_ELEMENTS = 32768;  // a task's, at least: some 10 microseconds

// Call row(i) for each of `rows` rows of `width` elements, in tasks of many.
template <class Row>
int for_rows(int64_t rows, int64_t width, Threads threads, const Row &row) {
    const int64_t step = TASK_ELEMENTS / width + 1;
    return share_out((rows + step - 1) / step, threads, [&](Tasks &tasks) {
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t stop = (task + 1) * step < rows ? (task + 1) * step : rows;
            for (int64_t i = task * step; i < stop; i++) row(i);
        }
        return 0;
    });
}

}  // namespace
