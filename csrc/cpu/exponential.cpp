// Standard exponential draws: PyTorch's uniform fp64 ones from its Mersenne Twister, then -log(1 - u).
#include <stdlib.h>
#include <string.h>

#include "each_cpu.h"
#include "kernels.h"

namespace {

constexpr int64_t WORDS = 624, SHIFT = 397;  // of MT19937
constexpr int64_t BLOCKS = 128;              // of WORDS, twisted at once: they stay in the cache
constexpr int64_t TASK_DRAWS = 4096;

// Continue the sequence whose first WORDS are given by `count` more: word n + 624 is of n, n + 1 and n + 397.
FOR_EACH_CPU void twist(uint32_t *words, int64_t count) {
#pragma omp simd safelen(64)
    for (int64_t i = 0; i < count; i++) {
        const uint32_t mixed = (words[i] & 0x80000000u) | (words[i + 1] & 0x7fffffffu);
        words[i + WORDS] = words[i + SHIFT] ^ (mixed >> 1) ^ (-(mixed & 1) & 0x9908b0dfu);
    }
}

INLINE inline uint32_t tempered(uint32_t word) {
    word ^= word >> 11;
    word ^= (word << 7) & 0x9d2c5680u;
    word ^= (word << 15) & 0xefc60000u;
    return word ^ (word >> 18);
}

// log(x) of a normal x > 0, to 2 units of the last place: k log 2 + 2 artanh((m - 1) / (m + 1)) for x = 2^k m with m in
// sqrt(1/2)..sqrt(2), by the series up to 2e-17 of the sum. k has 32 bits, as AVX2 converts no 64-bit integers to fp64.
INLINE inline double log_of(double x) {
    constexpr uint32_t ONE = 0x3ff00000u, ROOT = 0x3fe6a09eu;  // upper halves of 1 and of sqrt(1/2)
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t upper = (uint32_t)(bits >> 32) + (ONE - ROOT);
    const double k = (double)((int32_t)(upper >> 20) - 1023);
    bits = ((uint64_t)((upper & 0xfffffu) + ROOT) << 32) | (bits & 0xffffffffu);
    double m;
    memcpy(&m, &bits, sizeof m);
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double series = 1.0 / 21;
    series = series * z + 1.0 / 19;
    series = series * z + 1.0 / 17;
    series = series * z + 1.0 / 15;
    series = series * z + 1.0 / 13;
    series = series * z + 1.0 / 11;
    series = series * z + 1.0 / 9;
    series = series * z + 1.0 / 7;
    series = series * z + 1.0 / 5;
    series = series * z + 1.0 / 3;
    const double of_m = 2.0 * s + 2.0 * s * (z * series);
    return k * 0x1.62e42fefa39efp-1 + of_m;
}

// A draw is of two words: u has the lower 53 bits of the first's 32 and the second's. 1 - u is exact.
FOR_EACH_CPU void draw(const uint32_t *words, int64_t count, float *out) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const double upper = (double)(tempered(words[2 * i]) & 0x1fffffu), lower = (double)tempered(words[2 * i + 1]);
        const double u = (upper * 0x1p32 + lower) * 0x1p-53;
        out[i] = (float)(0.0 - log_of(1.0 - u));
    }
}

}  // namespace

HART_EXPORT int hart_infer_cpu_exponential(const Exponential *a, int threads, Parallel parallel) {
    uint32_t *words = (uint32_t *)malloc((1 + BLOCKS) * WORDS * sizeof(uint32_t));
    if (!words) return 1;
    Twister &state = *a->state;
    for (int64_t i = 0; i < WORDS; i++) words[i] = (uint32_t)state.words[i];
    int64_t next = state.left == 1 ? WORDS : (int64_t)state.next;
    for (int64_t done = 0; done < a->count;) {
        const int64_t rest = a->count - done, count = rest < BLOCKS * WORDS / 2 ? rest : BLOCKS * WORDS / 2;
        const int64_t blocks = (next + 2 * count + WORDS - 1) / WORDS - 1;  // after the first
        twist(words, blocks * WORDS);
        share_out((count + TASK_DRAWS - 1) / TASK_DRAWS, {threads, parallel}, [=](Tasks &tasks) {
            for (int64_t task; (task = tasks.take()) >= 0;) {
                const int64_t first = task * TASK_DRAWS, stop = first + TASK_DRAWS < count ? first + TASK_DRAWS : count;
                draw(words + next + 2 * first, stop - first, a->out + done + first);
            }
            return 0;
        });
        memmove(words, words + blocks * WORDS, WORDS * sizeof(uint32_t));
        next += 2 * count - blocks * WORDS;
        done += count;
    }
    for (int64_t i = 0; i < WORDS; i++) state.words[i] = words[i];
    state.next = (uint64_t)next;
    state.left = (int32_t)(WORDS + 1 - next);
    free(words);
    return 0;
}
