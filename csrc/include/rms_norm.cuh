// RMS norm of one row per block, in fp32, rounded where HART rounds; with parts before and after it that may
// be absent.
#pragma once

#include "reduce.cuh"
#include "rows.cuh"

namespace hart {

// out = rms_norm(total) * weight * (1 + scale) + shift, where total = x + update.
struct RmsNorm {
    View x;
    View update;         // absent: total is x, and not written
    const void* weight;  // [width]
    View scale, shift;   // both or neither
    View total, out;
    unsigned rows;  // of a group
    int width;
    float eps;
};

// VEC elements of x + update, in T.
template <typename T, int VEC>
struct Total {
    const T* x;
    const T* update;
    __device__ void operator()(float (&values)[VEC], int column) const {
        read(values, x + column);
        if (update == nullptr) return;
        float more[VEC];
        read(more, update + column);
#pragma unroll
        for (int i = 0; i < VEC; ++i) values[i] = sum<T>(values[i], more[i]);
    }
};

// The factor that gives a row a root mean square of 1, from the sum of this thread's squares.
static __device__ inline float rms_factor(float squares, int width, float eps) {
    return rsqrtf(block_sum(squares) / width + eps);
}

// T: of x, update, total, out. P: of weight, scale, shift; T itself, or narrower.
template <typename T, typename P, int VEC>
__global__ void __launch_bounds__(MAX_THREADS) rms_norm_kernel(RmsNorm call) {
    const T* update = call.update.data == nullptr ? nullptr : row_of<T>(call.update, call.rows);
    const Total<T, VEC> load{row_of<T>(call.x, call.rows), update};
    T* total = row_of<T>(call.total, call.rows);
    Held<VEC> held;
    float squares = 0.f;
    sweep<true, VEC>(held, call.width, load, [&](float (&values)[VEC], int column) {
        if (update != nullptr) write(total + column, values);
#pragma unroll
        for (int i = 0; i < VEC; ++i) squares += values[i] * values[i];
    });
    const float factor = rms_factor(squares, call.width, call.eps);
    const P* weight = static_cast<const P*>(call.weight);
    const bool modulated = call.scale.data != nullptr;
    const P* scale = row_of<P>(call.scale, call.rows);
    const P* shift = row_of<P>(call.shift, call.rows);
    T* out = row_of<T>(call.out, call.rows);
    sweep<false, VEC>(held, call.width, load, [&](float (&values)[VEC], int column) {
        float weights[VEC], normed[VEC];
        read(weights, weight + column);
#pragma unroll
        for (int i = 0; i < VEC; ++i) normed[i] = product<T>(product<T>(values[i], factor), weights[i]);
        if (modulated) {
            float scales[VEC], shifts[VEC];
            read(scales, scale + column);
            read(shifts, shift + column);
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                normed[i] = sum<T>(product<T>(normed[i], sum<P>(1.f, scales[i])), shifts[i]);
            }
        }
        write(out + column, normed);
    });
}

}  // namespace hart
