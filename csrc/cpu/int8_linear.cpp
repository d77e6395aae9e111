// A linear map in int8 by AVX512_VNNI: rows of bf16 are quantised as they come, sums are exact in int32, and leave as bf16.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")
#include "vectors.h"

namespace {

constexpr int PANEL = 32;          // outputs that lie together: weights are [panels][in / 4][32 outputs][4 inputs]
constexpr int TILE_ROWS = 12;      // 12 rows by 32 outputs: 24 sums in registers
constexpr int64_t TASK_ROWS = 192;  // whose quantised values stay in the second-level cache beside a panel
constexpr int64_t TASK_PANELS = 8;

// One row -> levels + 128, which vpdpbusd wants unsigned, and the row's scale: its largest magnitude / 127. Levels lie as
// a tile reads them, [in / 4][12 rows][4 inputs]: rows 4,096 bytes apart would compete for one set of the cache.
void quantise(const Int8Linear &a, int64_t row) {
    const uint16_t *x = a.x + row * a.in;
    uint8_t *levels = a.levels + row / TILE_ROWS * TILE_ROWS * a.in + row % TILE_ROWS * 4;
    const __m512 positive = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < a.in; i += 16) {
        most = _mm512_max_ps(most, _mm512_and_ps(positive, load(x + i, first_lanes(a.in - i))));
    }
    const float largest = _mm512_reduce_max_ps(most) / 127.0f, scale = largest > 1.17549435e-38f ? largest : 1.17549435e-38f;
    a.row_scales[row] = scale;
    const __m512 divisor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < a.in; i += 16) {
        const __mmask16 lanes = first_lanes(a.in - i);
        const __m512i level = _mm512_cvtps_epi32(_mm512_div_ps(load(x + i, lanes), divisor));  // to the nearest, ties to even
        const __m128i shifted = _mm512_cvtepi32_epi8(_mm512_add_epi32(level, _mm512_set1_epi32(128)));
        alignas(16) int32_t quads[4];
        _mm_store_si128((__m128i *)quads, shifted);
        for (int j = 0; j < 4 && i + 4 * j < a.in; j++) memcpy(levels + (i / 4 + j) * TILE_ROWS * 4, quads + j, 4);
    }
}

// Exact sums [rows, 32] -> bf16.
void finish(const Int8Linear &a, int64_t row, int rows, int64_t panel, const int32_t *sums) {
    for (int64_t i = 0; i < rows * PANEL; i += 16) {
        const int64_t column = panel * PANEL + i % PANEL, at = row + i / PANEL;
        if (column >= a.out_width) continue;
        const __mmask16 lanes = first_lanes(a.out_width - column);
        const __m512i excess = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(lanes, a.weight_sums + column), 7);  // 128 of each
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums + i), excess));
        const __m512 scaled = _mm512_mul_ps(sum, _mm512_set1_ps(a.row_scales[at]));
        __m512 out = _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(lanes, a.scale + column));
        if (a.bias) out = _mm512_add_ps(out, load(a.bias + column, lanes));
        store(a.out + at * a.out_width + column, lanes, out);
    }
}

template <int N>
void multiply(const Int8Linear &a, int64_t row, int64_t panel) {
    const uint8_t *levels = a.levels + row / TILE_ROWS * TILE_ROWS * a.in + row % TILE_ROWS * 4;
    const int8_t *weights = a.weight + panel * PANEL * a.in;
    __m512i left[N], right[N];
#pragma GCC unroll 12
    for (int i = 0; i < N; i++) left[i] = right[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < a.in; k += 4, weights += 4 * PANEL, levels += 4 * TILE_ROWS) {
        const __m512i first = _mm512_loadu_si512(weights), second = _mm512_loadu_si512(weights + 2 * PANEL);
#pragma GCC unroll 12
        for (int i = 0; i < N; i++) {
            int32_t four;
            memcpy(&four, levels + 4 * i, sizeof four);
            const __m512i x = _mm512_set1_epi32(four);
            left[i] = _mm512_dpbusd_epi32(left[i], x, first);
            right[i] = _mm512_dpbusd_epi32(right[i], x, second);
        }
    }
    alignas(64) int32_t sums[N * PANEL];  // if the vectors' own addresses were taken, g++ would store them in every step
#pragma GCC unroll 12
    for (int i = 0; i < N; i++) {
        _mm512_store_si512(sums + i * PANEL, left[i]);
        _mm512_store_si512(sums + i * PANEL + 16, right[i]);
    }
    finish(a, row, N, panel, sums);
}

void multiply_block(const Int8Linear &a, int64_t first, int64_t stop, int64_t panel) {
    int64_t row = first;
    for (; stop - row >= TILE_ROWS; row += TILE_ROWS) multiply<TILE_ROWS>(a, row, panel);
    for (; stop - row >= 4; row += 4) multiply<4>(a, row, panel);
    for (; row < stop; row++) multiply<1>(a, row, panel);
}

}  // namespace

HART_EXPORT int hart_infer_cpu_int8_linear(const Int8Linear *a, int threads, Parallel parallel) {
    for_rows(a->rows, a->in, {threads, parallel}, [a](int64_t row) { quantise(*a, row); });
    const int64_t panels = (a->out_width + PANEL - 1) / PANEL, groups = (panels + TASK_PANELS - 1) / TASK_PANELS;
    const int64_t blocks = (a->rows + TASK_ROWS - 1) / TASK_ROWS;
    return share_out(blocks * groups, {threads, parallel}, [=](Tasks &tasks) {
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t first = task / groups * TASK_ROWS, start = task % groups * TASK_PANELS;
            const int64_t stop = first + TASK_ROWS < a->rows ? first + TASK_ROWS : a->rows;
            for (int64_t panel = start; panel < start + TASK_PANELS && panel < panels; panel++) {
                multiply_block(*a, first, stop, panel);
            }
        }
        return 0;
    });
}
