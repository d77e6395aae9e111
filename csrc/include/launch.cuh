// What the launchers share: the library's C interface, choosing types and the width of packs, and the launch
// itself.
#pragma once

#include <initializer_list>

#include "reduce.cuh"
#include "rows.cuh"

#define HART_EXPORT extern "C" __attribute__((visibility("default")))

namespace hart {

// Dtypes as the caller names them.
enum Dtype : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, INT8 = 3, FLOAT8 = 4 };

constexpr int UNKNOWN_DTYPE =
    -1;  // what launchers return beside CUDA's own codes: the caller has not checked
constexpr int BAD_SHAPE = -2;

template <typename T>
struct Type {
    using type = T;
};

// run(Type<T>()) for an activation's dtype.
template <typename Run>
int with_dtype(int dtype, Run run) {
    if (dtype == FLOAT32) return run(Type<float>());
    if (dtype == FLOAT16) return run(Type<__half>());
    if (dtype == BFLOAT16) return run(Type<__nv_bfloat16>());
    return UNKNOWN_DTYPE;
}

template <typename T>
constexpr int widest_pack() {
    return 16 / sizeof(T);
}

// Whether every row begins where packs of VEC elements of T may begin; an absent tensor does.
template <typename T, int VEC>
bool aligned(std::initializer_list<View> views) {
    constexpr int64_t size = sizeof(T) * VEC;
    for (const View& view : views) {
        if (reinterpret_cast<uintptr_t>(view.data) % size || view.group % VEC || view.row % VEC) return false;
    }
    return true;
}

inline View whole(const void* data) { return {const_cast<void*>(data), 0, 0}; }

inline bool launchable(const Shape& shape) {
    const int64_t most = int64_t(1) << 31;
    return shape.groups > 0 && shape.rows > 0 && shape.rows < most && shape.groups < most &&
           shape.groups * shape.rows < most && shape.width > 0 && shape.width <= most / 2;
}

// One block per row, of as many warps as hold the row in registers, up to MAX_THREADS. Returns a CUDA error
// code.
template <typename Call>
int launch(void (*kernel)(Call), const Call& call, const Shape& shape, void* stream) {
    const int64_t warps = (shape.width + WARP * HELD - 1) / (WARP * HELD);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(shape.groups * shape.rows));
    config.blockDim = dim3(static_cast<unsigned>(warps * WARP < MAX_THREADS ? warps * WARP : MAX_THREADS));
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, call);
    if (error != cudaSuccess) cudaGetLastError();  // it is reported here, not to whoever asks next
    return static_cast<int>(error);
}

}  // namespace hart
