// bf16 in AVX-512 registers of fp32, and 2^x. Included after a file's `#pragma GCC target`.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace {

inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

inline __m512 load(const uint16_t *from, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

inline void store(uint16_t *to, __mmask16 lanes, __m512 x) {
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

// x rounded to bf16, as PyTorch rounds between two operations.
inline __m512 rounded(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

inline float widened(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// 2^x to 3e-6, by the best polynomial of degree 4, far below bf16's 2e-3; 0 for x under -150.
inline __m512 exp2_vector(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(0.0095701f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05591786f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24024745f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69312181f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99999926f));
    return _mm512_scalef_ps(p, whole);
}

}  // namespace
