// rms_norm, add_rms_norm and rms_norm_modulate: check and launch. The caller has checked shapes.
#include "rms_norm.cuh"

#include "launch.cuh"

namespace hart {
namespace {

template <typename T, typename P>
int run(const RmsNorm& call, const Shape& shape, void* stream) {
    constexpr int VEC = widest_pack<T>();
    const bool packs = shape.width % VEC == 0 &&
                       aligned<T, VEC>({call.x, call.update, call.total, call.out}) &&
                       aligned<P, VEC>({whole(call.weight), call.scale, call.shift});
    return launch(packs ? rms_norm_kernel<T, P, VEC> : rms_norm_kernel<T, P, 1>, call, shape, stream);
}

}  // namespace
}  // namespace hart

// Whether the driver and the current GPU take the library's code: one kernel is looked up, which loads it.
HART_EXPORT int hart_infer_trial() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, hart::rms_norm_kernel<float, float, 1>);
    if (error != cudaSuccess) cudaGetLastError();
    return static_cast<int>(error);
}

// `dtype` is that of x, update, total and out; `parameters` that of weight, scale and shift: the same, or any
// if x is fp32.
HART_EXPORT int hart_infer_rms_norm(hart::View x, hart::View update, const void* weight, hart::View scale,
                                    hart::View shift, hart::View total, hart::View out, hart::Shape shape,
                                    float eps, int dtype, int parameters, void* stream) {
    using namespace hart;
    if (!launchable(shape)) return BAD_SHAPE;
    const RmsNorm call{x,  update, weight, scale, shift, total, out, unsigned(shape.rows), int(shape.width),
                       eps};
    if (dtype != FLOAT32 && dtype != parameters) return UNKNOWN_DTYPE;
    return with_dtype(parameters, [&](auto parameter) {
        using P = typename decltype(parameter)::type;
        return dtype == FLOAT32 ? run<float, P>(call, shape, stream) : run<P, P>(call, shape, stream);
    });
}
