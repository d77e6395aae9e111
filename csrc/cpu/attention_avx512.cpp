// Attention by AVX512_BF16: vdpbf16ps multiplies 16 pairs and adds each pair's two products to an fp32 sum.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include "attention.h"

namespace {

// 12 queries by 32 keys, then 6 by 64 columns: 24 sums and up to 4 packed vectors in 32 registers. Weights and queries are
// broadcast from memory within the instruction.
struct Avx512 {
    static constexpr int ROWS = 12, DEPTH = 2;
    static void begin() {}
    static void end() {}

    static inline __m512 dot(__m512 sum, const uint16_t *pair, __m512i packed) {
        int32_t both;
        memcpy(&both, pair, sizeof both);
        return _mm512_dpbf16_ps(sum, (__m512bh)packed, (__m512bh)_mm512_set1_epi32(both));
    }

    template <int N>
    static inline void scores_of(const uint16_t *q, int64_t token, int64_t width, const uint32_t *panel, float *out,
                                 int64_t stride) {
        __m512 sums[N][2];
#pragma GCC unroll 12
        for (int i = 0; i < N; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
        for (int64_t d = 0; d < width; d += 2, panel += PANEL) {
            const __m512i left = _mm512_loadu_si512(panel), right = _mm512_loadu_si512(panel + 16);
#pragma GCC unroll 12
            for (int i = 0; i < N; i++) {
                sums[i][0] = dot(sums[i][0], q + i * token + d, left);
                sums[i][1] = dot(sums[i][1], q + i * token + d, right);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < N; i++) {
            _mm512_storeu_ps(out + i * stride, sums[i][0]);
            _mm512_storeu_ps(out + i * stride + 16, sums[i][1]);
        }
    }

    static Queries queries(int, const uint16_t *q, int64_t token, int64_t, int64_t, uint16_t *) { return {q, token}; }

    static void scores(int rows, Queries queries, int64_t width, const uint32_t *panel, float *out, int64_t stride) {
        const uint16_t *q = queries.data;
        const int64_t token = queries.token;
        while (rows > 0) {
            const int step = rows >= 12 ? 12 : rows >= 4 ? 4 : 1;
            (step == 12 ? scores_of<12> : step == 4 ? scores_of<4> : scores_of<1>)(q, token, width, panel, out, stride);
            rows -= step, q += step * token, out += step * stride;
        }
    }

    template <int N, int VECTORS>
    static inline void values_of(const uint16_t *weights, int64_t keys, const uint32_t *values, int64_t columns,
                                 const Row *rows, float *out) {
        __m512 sums[N][VECTORS];
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) {
            const __m512 decay = _mm512_set1_ps(rows[i].decay);
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) sums[i][j] = _mm512_mul_ps(decay, _mm512_loadu_ps(out + i * columns + 16 * j));
        }
        for (int64_t n = 0; n < keys; n += 2, values += columns) {
            __m512i packed[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) packed[j] = _mm512_loadu_si512(values + 16 * j);
#pragma GCC unroll 6
            for (int i = 0; i < N; i++) {
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; j++) sums[i][j] = dot(sums[i][j], weights + i * keys + n, packed[j]);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) _mm512_storeu_ps(out + i * columns + 16 * j, sums[i][j]);
        }
    }

    template <int N>
    static inline void columns_of(const uint16_t *weights, int64_t keys, const uint32_t *values, int64_t columns,
                                  const Row *rows, float *out) {
        int64_t done = 0;
        for (; columns - done >= 64; done += 64) values_of<N, 4>(weights, keys, values + done, columns, rows, out + done);
        for (; columns - done >= 32; done += 32) values_of<N, 2>(weights, keys, values + done, columns, rows, out + done);
        for (; columns - done >= 16; done += 16) values_of<N, 1>(weights, keys, values + done, columns, rows, out + done);
    }

    static void values(int rows, const uint16_t *weights, int64_t keys, const uint32_t *values, int64_t columns, const Row *row,
                       float *out) {
        while (rows > 0) {
            const int step = rows >= 6 ? 6 : rows >= 2 ? 2 : 1;
            (step == 6 ? columns_of<6> : step == 2 ? columns_of<2> : columns_of<1>)(weights, keys, values, columns, row, out);
            rows -= step, weights += step * keys, row += step, out += step * columns;
        }
    }
};

}  // namespace

int attention_avx512(const Attention &attention, Threads threads) { return run<Avx512>(attention, threads); }
