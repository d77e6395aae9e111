// rms_norm_quantized: check and launch. The caller has checked shapes.
#include "rms_norm_quantized.cuh"

#include "launch.cuh"

namespace hart {
namespace {

template <typename T, typename Q>
int run(const RmsNormQuantized& call, const Shape& shape, void* stream) {
    constexpr int VEC = widest_pack<T>();
    const bool packs = shape.width % VEC == 0 && aligned<T, VEC>({call.x, whole(call.weight)}) &&
                       aligned<Q, VEC>({call.out});
    return launch(packs ? rms_norm_quantized_kernel<T, Q, VEC> : rms_norm_quantized_kernel<T, Q, 1>, call,
                  shape, stream);
}

}  // namespace
}  // namespace hart

// `dtype` is that of x and weight, `quantized` that of out; scales [groups * rows] fp32.
HART_EXPORT int hart_infer_rms_norm_quantized(hart::View x, const void* weight, hart::View out, void* scales,
                                              hart::Shape shape, float eps, int dtype, int quantized,
                                              void* stream) {
    using namespace hart;
    if (!launchable(shape)) return BAD_SHAPE;
    const RmsNormQuantized call{
        x, weight, out, static_cast<float*>(scales), unsigned(shape.rows), int(shape.width), eps};
    return with_dtype(dtype, [&](auto element) {
        using T = typename decltype(element)::type;
        if (quantized == INT8) return run<T, int8_t>(call, shape, stream);
        return quantized == FLOAT8 ? run<T, Float8>(call, shape, stream) : UNKNOWN_DTYPE;
    });
}
