// Rows of tensors, and how the threads of one block share a row.
#pragma once

#include "numbers.cuh"

namespace hart {

// A tensor [groups, rows, width], contiguous along its width: where it is and its strides in elements. A
// stride of 0 shares a row within a group or between groups. An absent tensor has no data. Part of the
// library's C interface.
struct View {
    void* data;
    int64_t group;
    int64_t row;
};

// Shape of all tensors of a call: [groups, rows, width].
struct Shape {
    int64_t groups;
    int64_t rows;
    int64_t width;
};

// The row of `view` that a block works on: one block per row, blocks counted over the groups.
template <typename T>
__device__ inline T* row_of(const View& view, unsigned rows) {
    const int64_t group = blockIdx.x / rows, row = blockIdx.x % rows;
    return static_cast<T*>(view.data) + group * view.group + row * view.row;
}

constexpr int MAX_THREADS = 512;  // of a block
constexpr int HELD = 16;          // elements of a row that a thread keeps in registers

// A thread's first packs of a row.
template <int VEC>
using Held = float[HELD / VEC][VEC];

// One pass over this thread's share of a row: use(values, column) for each pack. The first packs stay in
// `held`; `load` reads them on the FIRST pass. What a very wide row has beyond them is read again on every
// pass.
template <bool FIRST, int VEC, typename Load, typename Use>
__device__ inline void sweep(Held<VEC>& held, int width, Load load, Use use) {
    const int step = blockDim.x * VEC;
    int column = threadIdx.x * VEC;
#pragma unroll
    for (int i = 0; i < HELD / VEC; ++i, column += step) {
        if (column < width) {
            if (FIRST) load(held[i], column);
            use(held[i], column);
        }
    }
    for (; column < width; column += step) {
        float values[VEC];
        load(values, column);
        use(values, column);
    }
}

}  // namespace hart
