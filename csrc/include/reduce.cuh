// Sums and maxima over the threads of a block, which every thread receives. A block is one or more whole
// warps.
//
// These are not templates and not visible to other files, so that the host build can find their shared
// memory.
#pragma once

#include "numbers.cuh"

namespace hart {

constexpr int WARP = 32;
constexpr unsigned EVERY_LANE = 0xffffffffu;

static __device__ inline float warp_sum(float value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(EVERY_LANE, value, distance);
    }
    return value;
}

static __device__ inline float warp_max(float value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(EVERY_LANE, value, distance));
    }
    return value;
}

// Each warp's `value` to every warp: lane i gets that of warp i, or `nothing` where there is no such warp.
static __device__ inline float exchanged(float value, float nothing) {
    __shared__ float of_warp[WARP];
    const unsigned lane = threadIdx.x % WARP;
    if (lane == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    value = lane < blockDim.x / WARP ? of_warp[lane] : nothing;
    __syncthreads();  // the next exchange writes there again
    return value;
}

static __device__ inline float block_sum(float value) {
    value = warp_sum(value);
    return blockDim.x == WARP ? value : warp_sum(exchanged(value, 0.f));
}

// Of numbers that are not negative.
static __device__ inline float block_max(float value) {
    value = warp_max(value);
    return blockDim.x == WARP ? value : warp_max(exchanged(value, 0.f));
}

}  // namespace hart
