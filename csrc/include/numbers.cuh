// Numbers: conversions that round to nearest even, and reading and writing several at once.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <float.h>
#include <stdint.h>

namespace hart {

struct Float8 {  // e4m3, as PyTorch's float8_e4m3fn
    __nv_fp8_storage_t bits;
};

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T narrowed(float x);
template <>
__device__ inline float narrowed<float>(float x) {
    return x;
}
template <>
__device__ inline __half narrowed<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrowed<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ inline int8_t narrowed<int8_t>(float x) {
    return static_cast<int8_t>(fminf(fmaxf(rintf(x), -128.f), 127.f));
}
template <>
__device__ inline Float8 narrowed<Float8>(float x) {
    return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)};
}

// The largest number that a quantised row is scaled to.
template <typename Q>
struct Largest;
template <>
struct Largest<int8_t> {
    static constexpr float value = 127.f;
};
template <>
struct Largest<Float8> {
    static constexpr float value = 448.f;
};

// What is left of a number after it has been stored in T.
template <typename T>
__device__ inline float rounded(float x) {
    return widened(narrowed<T>(x));
}

// Product and sum as two PyTorch operations give them: each rounded to T, never fused into one.
template <typename T>
__device__ inline float product(float x, float y) {
    return rounded<T>(__fmul_rn(x, y));
}
template <typename T>
__device__ inline float sum(float x, float y) {
    return rounded<T>(__fadd_rn(x, y));
}

#ifndef HART_READ  // the tests' build counts bytes
#define HART_READ(from, bytes)
#define HART_WRITE(to, bytes)
#endif

// VEC neighbours, moved by one instruction of up to 16 bytes.
template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
    T items[VEC];
};

template <typename T, int VEC>
__device__ inline void read(float (&values)[VEC], const T* from) {
    HART_READ(from, sizeof(T) * VEC);
    const Pack<T, VEC> pack = *reinterpret_cast<const Pack<T, VEC>*>(from);
#pragma unroll
    for (int i = 0; i < VEC; ++i) values[i] = widened(pack.items[i]);
}

template <typename T, int VEC>
__device__ inline void write(T* to, const float (&values)[VEC]) {
    HART_WRITE(to, sizeof(T) * VEC);
    Pack<T, VEC> pack;
#pragma unroll
    for (int i = 0; i < VEC; ++i) pack.items[i] = narrowed<T>(values[i]);
    *reinterpret_cast<Pack<T, VEC>*>(to) = pack;
}

}  // namespace hart
