// Layer norm of one row per block, in fp32, then scale and shift; with a gated update added before, which may
// be absent.
#pragma once

#include "reduce.cuh"
#include "rows.cuh"

namespace hart {

// out = layer_norm(total) * (1 + scale) + shift, where total = x + gate * update.
struct LayerNormModulate {
    View x;
    View update, gate;          // absent: total is x, and not written
    const void *weight, *bias;  // [width]; each may be absent
    View scale, shift;
    View total, out;
    unsigned rows;  // of a group
    int width;
    float eps;
};

// VEC elements of x + gate * update, in T.
template <typename T, int VEC>
struct GatedTotal {
    const T* x;
    const T* update;
    const T* gate;
    __device__ void operator()(float (&values)[VEC], int column) const {
        read(values, x + column);
        if (update == nullptr) return;
        float more[VEC], gates[VEC];
        read(more, update + column);
        read(gates, gate + column);
#pragma unroll
        for (int i = 0; i < VEC; ++i) values[i] = sum<T>(values[i], product<T>(gates[i], more[i]));
    }
};

template <typename T, int VEC>
__global__ void __launch_bounds__(MAX_THREADS) layer_norm_modulate_kernel(LayerNormModulate call) {
    const T* update = call.update.data == nullptr ? nullptr : row_of<T>(call.update, call.rows);
    const GatedTotal<T, VEC> load{row_of<T>(call.x, call.rows), update, row_of<T>(call.gate, call.rows)};
    T* total = row_of<T>(call.total, call.rows);
    Held<VEC> held;
    float plain = 0.f;
    sweep<true, VEC>(held, call.width, load, [&](float (&values)[VEC], int column) {
        if (update != nullptr) write(total + column, values);
#pragma unroll
        for (int i = 0; i < VEC; ++i) plain += values[i];
    });
    const float mean = block_sum(plain) / call.width;
    float squares = 0.f;
    sweep<false, VEC>(held, call.width, load, [&](float (&values)[VEC], int) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) squares += (values[i] - mean) * (values[i] - mean);
    });
    const float factor = rsqrtf(block_sum(squares) / call.width + call.eps);
    const T* weight = static_cast<const T*>(call.weight);
    const T* bias = static_cast<const T*>(call.bias);
    const T* scale = row_of<T>(call.scale, call.rows);
    const T* shift = row_of<T>(call.shift, call.rows);
    T* out = row_of<T>(call.out, call.rows);
    sweep<false, VEC>(held, call.width, load, [&](float (&values)[VEC], int column) {
        float normed[VEC], factors[VEC], addends[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i) normed[i] = (values[i] - mean) * factor;
        if (weight != nullptr) {
            read(factors, weight + column);
#pragma unroll
            for (int i = 0; i < VEC; ++i) normed[i] *= factors[i];
        }
        if (bias != nullptr) {
            read(addends, bias + column);
#pragma unroll
            for (int i = 0; i < VEC; ++i) normed[i] += addends[i];
        }
        read(factors, scale + column);
        read(addends, shift + column);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            normed[i] = sum<T>(product<T>(rounded<T>(normed[i]), sum<T>(1.f, factors[i])), addends[i]);
        }
        write(out + column, normed);
    });
}

}  // namespace hart
