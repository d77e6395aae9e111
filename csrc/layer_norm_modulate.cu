// layer_norm_modulate and gated_layer_norm_modulate: check and launch. The caller has checked shapes.
#include "layer_norm_modulate.cuh"

#include "launch.cuh"

namespace hart {
namespace {

template <typename T>
int run(const LayerNormModulate& call, const Shape& shape, void* stream) {
    constexpr int VEC = widest_pack<T>();
    const bool packs = shape.width % VEC == 0 &&
                       aligned<T, VEC>({call.x, call.update, call.gate, whole(call.weight), whole(call.bias),
                                        call.scale, call.shift, call.total, call.out});
    return launch(packs ? layer_norm_modulate_kernel<T, VEC> : layer_norm_modulate_kernel<T, 1>, call, shape,
                  stream);
}

}  // namespace
}  // namespace hart

// All of one `dtype`.
HART_EXPORT int hart_infer_layer_norm_modulate(hart::View x, hart::View update, hart::View gate,
                                               const void* weight, const void* bias, hart::View scale,
                                               hart::View shift, hart::View total, hart::View out,
                                               hart::Shape shape, float eps, int dtype, void* stream) {
    using namespace hart;
    if (!launchable(shape)) return BAD_SHAPE;
    const LayerNormModulate call{
        x, update, gate, weight, bias, scale, shift, total, out, unsigned(shape.rows), int(shape.width), eps};
    return with_dtype(
        dtype, [&](auto element) { return run<typename decltype(element)::type>(call, shape, stream); });
}
