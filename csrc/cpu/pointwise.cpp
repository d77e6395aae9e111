// RMS norm, layer norm, SwiGLU, GELU and rotary positions in bf16: each rounds where PyTorch's operations do.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include "vectors.h"

namespace {

void norm_row(const RmsNorm &a, int64_t row) {
    const int64_t start = row * a.width;
    const uint16_t *x = a.x + start;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < a.width; i += 16) {
        const __mmask16 lanes = first_lanes(a.width - i);
        __m512 value = load(x + i, lanes);
        if (a.update) {
            value = rounded(_mm512_add_ps(value, load(a.update + start + i, lanes)));
            store(a.total + start + i, lanes, value);
        }
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / (float)a.width;
    const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + a.eps));
    if (a.update) x = a.total + start;
    for (int64_t i = 0; i < a.width; i += 16) {
        const __mmask16 lanes = first_lanes(a.width - i);
        const __m512 normed = rounded(_mm512_mul_ps(load(x + i, lanes), scale));
        store(a.out + start + i, lanes, _mm512_mul_ps(normed, load(a.weight + i, lanes)));
    }
}

void layer_norm_row(const LayerNorm &a, int64_t index) {
    const int64_t start = index * a.width, group = index / a.rows, row = index % a.rows;
    const uint16_t *x = a.x + start, *gate = a.gate.data + group * a.gate.group + row * a.gate.row;
    const uint16_t *scale = a.scale.data + group * a.scale.group + row * a.scale.row;
    const uint16_t *shift = a.shift.data + group * a.shift.group + row * a.shift.row;
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < a.width; i += 16) {
        const __mmask16 lanes = first_lanes(a.width - i);
        __m512 value = load(x + i, lanes);
        if (a.update) {
            const __m512 added = rounded(_mm512_mul_ps(load(gate + i, lanes), load(a.update + start + i, lanes)));
            value = rounded(_mm512_add_ps(value, added));
            store(a.total + start + i, lanes, value);
        }
        sums = _mm512_add_ps(sums, value);
    }
    if (a.update) x = a.total + start;
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sums) / (float)a.width);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < a.width; i += 16) {
        const __mmask16 lanes = first_lanes(a.width - i);
        const __m512 centred = _mm512_maskz_sub_ps(lanes, load(x + i, lanes), mean);
        squares = _mm512_fmadd_ps(centred, centred, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / (float)a.width;
    const __m512 inverse = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + a.eps));
    for (int64_t i = 0; i < a.width; i += 16) {
        const __mmask16 lanes = first_lanes(a.width - i);
        __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load(x + i, lanes), mean), inverse);
        if (a.weight) normed = _mm512_mul_ps(normed, load(a.weight + i, lanes));
        if (a.bias) normed = _mm512_add_ps(normed, load(a.bias + i, lanes));
        const __m512 scaled = _mm512_mul_ps(rounded(normed), rounded(_mm512_add_ps(one, load(scale + i, lanes))));
        store(a.out + start + i, lanes, _mm512_add_ps(rounded(scaled), load(shift + i, lanes)));
    }
}

void gate_row(const Swiglu &a, int64_t row) {
    const __m512 one = _mm512_set1_ps(1.0f), minus_log2e = _mm512_set1_ps(-1.44269504088896f);
    for (int64_t i = row * a.width, stop = i + a.width; i < stop; i += 16) {
        const __mmask16 lanes = first_lanes(stop - i);
        const __m512 gate = load(a.gate + i, lanes);
        const __m512 silu = _mm512_div_ps(gate, _mm512_add_ps(one, exp2_vector(_mm512_mul_ps(gate, minus_log2e))));
        store(a.out + i, lanes, _mm512_mul_ps(rounded(silu), load(a.up + i, lanes)));
    }
}

// x (1 + tanh u) / 2, where u = sqrt(2 / pi) (x + 0.044715 x^3): x / (1 + 2^(-2 u log2(e))), in which nothing cancels. Below -4,
// where 1 + tanh u does in fp32, PyTorch's numbers are the rougher ones; results below 2^-124 may be 0.
void gelu_row(const GeluTanh &a, int64_t row) {
    const __m512 one = _mm512_set1_ps(1.0f), cubic = _mm512_set1_ps(0.044715f), minus_2_log2e = _mm512_set1_ps(-2.30220819813f);
    for (int64_t i = row * a.width, stop = i + a.width; i < stop; i += 16) {
        const __mmask16 lanes = first_lanes(stop - i);
        const __m512 x = load(a.x + i, lanes);
        const __m512 inner = _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), cubic, one));
        store(a.out + i, lanes, _mm512_div_ps(x, _mm512_add_ps(one, exp2_vector(_mm512_mul_ps(inner, minus_2_log2e)))));
    }
}

// Divide by the l2 norm, then multiply by the gain, rounding the norm and each result.
struct Normaliser {
    __m512 norm, gain;
    Normaliser(const uint16_t *x, int64_t width, float gain_) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 value = load(x + i, first_lanes(width - i));
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        norm = rounded(_mm512_set1_ps(__builtin_sqrtf(_mm512_reduce_add_ps(squares))));
        norm = _mm512_max_ps(norm, rounded(_mm512_set1_ps(1e-12f)));
        gain = _mm512_set1_ps(gain_);
    }
    __m512 operator()(__m512 x) const { return rounded(_mm512_mul_ps(rounded(_mm512_div_ps(x, norm)), gain)); }
};

// One head of one token: out_i = x_i cos_i - x_{i+h} sin_i and out_{i+h} = x_{i+h} cos_{i+h} + x_i sin_{i+h}, h half the width.
template <bool NORMALISED>
void rotate(const uint16_t *x, const uint16_t *cos, const uint16_t *sin, float gain, int64_t width, uint16_t *out) {
    const int64_t half = width / 2;
    const Normaliser normalise(x, NORMALISED ? width : 0, gain);
    for (int64_t i = 0; i < half; i += 16) {
        const __mmask16 lanes = first_lanes(half - i);
        __m512 first = load(x + i, lanes), second = load(x + half + i, lanes);
        if (NORMALISED) first = normalise(first), second = normalise(second);
        const __m512 a = rounded(_mm512_mul_ps(first, load(cos + i, lanes)));
        const __m512 b = rounded(_mm512_mul_ps(second, load(sin + i, lanes)));
        const __m512 c = rounded(_mm512_mul_ps(second, load(cos + half + i, lanes)));
        const __m512 d = rounded(_mm512_mul_ps(first, load(sin + half + i, lanes)));
        store(out + i, lanes, _mm512_sub_ps(a, b));
        store(out + half + i, lanes, _mm512_add_ps(c, d));
    }
}

template <class View>
auto place(const View &x, int64_t row, int64_t head, int64_t token) {
    return x.data + row * x.row + head * x.head + token * x.token;
}

void rope_token(const RopeCache &a, int64_t index) {
    const int64_t row = index / a.tokens, token = index % a.tokens;
    const uint16_t *cos = place(a.cos, row, 0, token), *sin = place(a.sin, row, 0, token);
    for (int64_t head = 0; head < a.heads; head++) {
        const uint16_t *q = place(a.q, row, head, token), *k = place(a.k, row, head, token);
        uint16_t *rotated = place(a.rotated, row, head, token), *key = place(a.keys, row, head, token);
        if (a.gains) {
            rotate<true>(q, cos, sin, widened(a.gains[head]), a.head_dim, rotated);
            rotate<true>(k, cos, sin, 1.0f, a.head_dim, key);
        } else {
            rotate<false>(q, cos, sin, 1.0f, a.head_dim, rotated);
            rotate<false>(k, cos, sin, 1.0f, a.head_dim, key);
        }
        memcpy(place(a.values, row, head, token), place(a.v, row, head, token), a.head_dim * sizeof(uint16_t));
    }
}

}  // namespace

HART_EXPORT int hart_infer_cpu_rms_norm(const RmsNorm *a, int threads, Parallel parallel) {
    return for_rows(a->rows, a->width, {threads, parallel}, [a](int64_t row) { norm_row(*a, row); });
}

HART_EXPORT int hart_infer_cpu_layer_norm(const LayerNorm *a, int threads, Parallel parallel) {
    return for_rows(a->groups * a->rows, a->width, {threads, parallel}, [a](int64_t row) { layer_norm_row(*a, row); });
}

HART_EXPORT int hart_infer_cpu_swiglu(const Swiglu *a, int threads, Parallel parallel) {
    return for_rows(a->rows, a->width, {threads, parallel}, [a](int64_t row) { gate_row(*a, row); });
}

HART_EXPORT int hart_infer_cpu_gelu_tanh(const GeluTanh *a, int threads, Parallel parallel) {
    return for_rows(a->rows, a->width, {threads, parallel}, [a](int64_t row) { gelu_row(*a, row); });
}

HART_EXPORT int hart_infer_cpu_rope_cache(const RopeCache *a, int threads, Parallel parallel) {
    const int64_t width = 3 * a->heads * a->head_dim;
    return for_rows(a->rows * a->tokens, width, {threads, parallel}, [a](int64_t index) { rope_token(*a, index); });
}
