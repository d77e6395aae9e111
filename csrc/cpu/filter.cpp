// Top-k and top-p of rows of logits in fp32, without a sort. Plain C++, which g++ vectorises for AVX-512, AVX2 and neither.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "each_cpu.h"
#include "kernels.h"

namespace {

constexpr int64_t TASK_ROWS = 8;

// fp32 as integers of the same order; -0.0 and 0.0 are the same.
INLINE inline int32_t ordered(float x) {
    int32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// e^x for x up to 0, to 1e-7 of it; 0 under -87.
INLINE inline float exp_of(float x) {
    const float inside = x < -87.0f ? -87.0f : x;
    const float whole = (float)(int32_t)(inside * 1.44269504f - 0.5f);
    const float r = inside - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0.0f : (p * r * r + r + 1.0f) * scale;
}

INLINE inline int64_t count_from(const int32_t *order, int64_t n, int32_t lowest) {
    int64_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; i++) count += order[i] >= lowest;
    return count;
}

INLINE inline double mass_below(const int32_t *order, const float *weight, int64_t n, int32_t limit) {
    double mass = 0;
#pragma omp simd reduction(+ : mass)
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, weight + i, sizeof bits);
        bits &= -(order[i] < limit);  // a branch would keep the loop from being vectorised
        float counted;
        memcpy(&counted, &bits, sizeof counted);
        mass += counted;
    }
    return mass;
}

// The largest integer that `fits`, found bit by bit; all below it fit too.
template <class Fits>
INLINE inline int32_t largest(const Fits &fits) {
    uint32_t found = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
        if (fits((int32_t)((found | bit) ^ 0x80000000u))) found |= bit;
    }
    return (int32_t)(found ^ 0x80000000u);
}

// As the reference does: of equal logits the first go first, and one of the best always stays.
FOR_EACH_CPU void filter_row(float *row, const Filter *a, int32_t *order, float *weight) {
    const int64_t n = a->width;
    float best = -INFINITY;
    int64_t unordered = 0;
#pragma omp simd reduction(max : best) reduction(+ : unordered)
    for (int64_t i = 0; i < n; i++) {
        best = row[i] > best ? row[i] : best;
        unordered += row[i] != row[i];
    }
    if (unordered || best == INFINITY || best == -INFINITY) return;  // no softmax: whoever draws says so
#pragma omp simd
    for (int64_t i = 0; i < n; i++) order[i] = ordered(row[i]);
    int32_t lowest = INT32_MIN;
    int64_t equal_dropped = 0;  // of those at `lowest`
    if (a->top_k) lowest = largest([=](int32_t limit) INLINE { return count_from(order, n, limit) >= a->top_k; });
    if (a->has_top_p) {
        double total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n; i++) {
            weight[i] = order[i] >= lowest ? exp_of(row[i] - best) : 0.0f;
            total += weight[i];
        }
        const auto fits = [=](double mass) INLINE { return (float)(mass / total) <= a->removable; };
        const int32_t limit = largest([=](int32_t limit) INLINE { return fits(mass_below(order, weight, n, limit)); });
        const int32_t top = ordered(best);
        lowest = limit < top ? limit : top;
        double mass = mass_below(order, weight, n, lowest);
        const int64_t equal = count_from(order, n, lowest) - count_from(order, n, lowest + 1);  // a number, so not INT32_MAX
        for (int64_t i = 0; i < n && equal_dropped < equal - (lowest == top); i++) {
            if (order[i] != lowest) continue;
            if (!fits(mass += weight[i])) break;
            equal_dropped++;
        }
    }
    for (int64_t i = 0; i < n; i++) {
        if (order[i] < lowest || (order[i] == lowest && equal_dropped-- > 0)) row[i] = -INFINITY;
    }
}

}  // namespace

HART_EXPORT int hart_infer_cpu_filter(const Filter *a, int threads, Parallel parallel) {
    return share_out((a->rows + TASK_ROWS - 1) / TASK_ROWS, {threads, parallel}, [a](Tasks &tasks) {
        int32_t *order = (int32_t *)malloc(a->width * (sizeof(int32_t) + sizeof(float)));
        if (!order) return 1;
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t stop = (task + 1) * TASK_ROWS < a->rows ? (task + 1) * TASK_ROWS : a->rows;
            for (int64_t i = task * TASK_ROWS; i < stop; i++) {
                filter_row(a->logits + i * a->width, a, order, (float *)(order + a->width));
            }
        }
        free(order);
        return 0;
    });
}
