// Calls every launcher with heap buffers of exactly the size that it may touch, for the sanitizers: one
// number read or written too many, or a pack that is not aligned, ends the program.
#include <initializer_list>

#include "rows.cuh"

using hart::Shape;
using hart::View;

extern "C" {
int hart_infer_rms_norm(View, View, const void*, View, View, View, View, Shape, float, int, int, void*);
int hart_infer_rms_norm_quantized(View, const void*, View, void*, Shape, float, int, int, void*);
int hart_infer_layer_norm_modulate(View, View, View, const void*, const void*, View, View, View, View, Shape,
                                   float, int, void*);
}

namespace {

constexpr int GROUPS = 2, ROWS = 2;

// Exactly the elements from the first row's beginning to the last row's end, filled with small numbers of any
// dtype.
class Buffer {
  public:
    Buffer(int groups, int rows, int width, int size, int gap)
        : rows_(rows),
          width_(width + gap),
          bytes_((size_t(groups) * rows * width_ - gap) * size),
          data_(malloc(bytes_)) {
        memset(data_, 0x22, bytes_);
    }
    ~Buffer() { free(data_); }
    Buffer(const Buffer&) = delete;
    View view() const { return {data_, int64_t(rows_) * width_, rows_ == 1 ? 0 : width_}; }
    void* data() const { return data_; }

  private:
    int rows_;
    int64_t width_;
    size_t bytes_;
    void* data_;
};

int call_all(int width, int gap, int dtype) {
    const int size = dtype == 0 ? 4 : 2;
    const Shape shape{GROUPS, ROWS, width};
    const Buffer x(GROUPS, ROWS, width, size, gap), update(GROUPS, ROWS, width, size, gap);
    const Buffer scale(GROUPS, 1, width, size, gap), shift(GROUPS, 1, width, size, gap);
    const Buffer half_scale(GROUPS, 1, width, 2, gap), half_shift(GROUPS, 1, width, 2, gap);
    const Buffer total(GROUPS, ROWS, width, size, 0), out(GROUPS, ROWS, width, size, 0),
        bytes(GROUPS, ROWS, width, 1, 0);
    const Buffer weight(1, 1, width, size, 0), bias(1, 1, width, size, 0), half_weight(1, 1, width, 2, 0);
    const Buffer scales(1, 1, GROUPS * ROWS, 4, 0);
    const View none{};
    int failures = 0;
    failures += 0 != hart_infer_rms_norm(x.view(), none, weight.data(), none, none, none, out.view(), shape,
                                         1e-6f, dtype, dtype, nullptr);
    failures += 0 != hart_infer_rms_norm(x.view(), update.view(), weight.data(), scale.view(), shift.view(),
                                         total.view(), out.view(), shape, 1e-6f, dtype, dtype, nullptr);
    if (dtype == 0) {
        failures +=
            0 != hart_infer_rms_norm(x.view(), none, half_weight.data(), half_scale.view(), half_shift.view(),
                                     none, out.view(), shape, 1e-6f, 0, 2, nullptr);
    }
    for (int quantized : {3, 4}) {
        failures += 0 != hart_infer_rms_norm_quantized(x.view(), weight.data(), bytes.view(), scales.data(),
                                                       shape, 1e-6f, dtype, quantized, nullptr);
    }
    failures +=
        0 != hart_infer_layer_norm_modulate(x.view(), none, none, nullptr, nullptr, scale.view(),
                                            shift.view(), none, out.view(), shape, 1e-6f, dtype, nullptr);
    failures += 0 != hart_infer_layer_norm_modulate(x.view(), update.view(), scale.view(), weight.data(),
                                                    bias.data(), scale.view(), shift.view(), total.view(),
                                                    out.view(), shape, 1e-6f, dtype, nullptr);
    return failures;
}

}  // namespace

int main() {
    int failures = 0;
    for (int width : {1, 7, 1000, 8200, 9001}) {
        for (int gap : {0, 1, 8}) {
            for (int dtype : {0, 1, 2}) failures += call_all(width, gap, dtype);
        }
    }
    return failures == 0 ? 0 : 1;
}
