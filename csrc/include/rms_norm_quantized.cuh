// RMS norm whose rows are scaled into the range of an 8-bit type.
#pragma once

#include "rms_norm.cuh"

namespace hart {

// out * scales = rms_norm(x) * weight; scales [groups * rows] fp32.
struct RmsNormQuantized {
    View x;
    const void* weight;  // [width]
    View out;
    float* scales;
    unsigned rows;  // of a group
    int width;
    float eps;
};

// T: of x and weight. Q: of out.
template <typename T, typename Q, int VEC>
__global__ void __launch_bounds__(MAX_THREADS) rms_norm_quantized_kernel(RmsNormQuantized call) {
    const Total<T, VEC> load{row_of<T>(call.x, call.rows), nullptr};
    const T* weight = static_cast<const T*>(call.weight);
    Held<VEC> held;
    float squares = 0.f;
    sweep<true, VEC>(held, call.width, load, [&](float (&values)[VEC], int) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) squares += values[i] * values[i];
    });
    const float factor = rms_factor(squares, call.width, call.eps);
    const auto normalise = [&](float (&values)[VEC], int column) {
        float weights[VEC];
        read(weights, weight + column);
#pragma unroll
        for (int i = 0; i < VEC; ++i) values[i] = product<T>(product<T>(values[i], factor), weights[i]);
    };
    float largest = 0.f;
    sweep<false, VEC>(held, call.width, load, [&](float (&values)[VEC], int column) {
        normalise(values, column);  // what is held stays normalised
#pragma unroll
        for (int i = 0; i < VEC; ++i) largest = fmaxf(largest, fabsf(values[i]));
    });
    // fmaxf drops NaN; a row with NaN or infinity has a factor that is no positive number.
    const float largest_of_row = block_max(largest);
    const float scale =
        factor > 0.f ? fmaxf(__fdiv_rn(largest_of_row, Largest<Q>::value), FLT_MIN) : nanf("");
    if (threadIdx.x == 0) call.scales[blockIdx.x] = scale;
    Q* out = row_of<Q>(call.out, call.rows);
    const auto reload = [&](float (&values)[VEC], int column) {
        load(values, column);
        normalise(values, column);
    };
    sweep<false, VEC>(held, call.width, reload, [&](float (&values)[VEC], int column) {
        float quotients[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i) quotients[i] = __fdiv_rn(values[i], scale);
        write(out + column, quotients);
    });
}

}  // namespace hart
