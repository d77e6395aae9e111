// Draws by csrc/cpu/exponential.cpp and by the standard library's Mersenne Twister and log1p; compiled with sanitizers. Prints
// nothing and returns 0 if all agree.
#include "../../csrc/cpu/exponential.cpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

int main() {
    for (int64_t before : {0, 1, 2, 623, 624}) {
        std::mt19937 random(7);
        Twister state = {7, 1, 1, 0, {}};
        uint32_t word = 7;
        for (int64_t i = 0; i < WORDS; i++) {
            state.words[i] = word;
            word = 1812433253u * (word ^ (word >> 30)) + (uint32_t)i + 1;
        }
        random.discard(before);
        if (before) {  // as a generator is behind so many words: twisted once
            std::vector<uint32_t> twisted(2 * WORDS);
            for (int64_t i = 0; i < WORDS; i++) twisted[i] = (uint32_t)state.words[i];
            twist(twisted.data(), WORDS);
            for (int64_t i = 0; i < WORDS; i++) state.words[i] = twisted[WORDS + i];
            state.next = (uint64_t)before;
            state.left = (int32_t)(WORDS + 1 - before);
        }
        int64_t words = before;  // drawn so far
        for (int64_t count : {1, 311, 312, 313, 39936, 40249}) {
            std::vector<float> found(count);
            const Exponential exponential = {&state, found.data(), count};
            if (hart_infer_cpu_exponential(&exponential, 1, nullptr)) return 2;
            for (int64_t i = 0; i < count; i++) {
                const uint64_t upper = random(), lower = random();
                const double u = (double)(((upper << 32) | lower) & ((1ull << 53) - 1)) / (double)(1ull << 53);
                const double expected = -std::log1p(-u);
                if (std::fabs(found[i] - expected) <= 6e-8 * expected) continue;
                printf("behind %d words, draw %d of %d: %g, not %g\n", (int)before, (int)i, (int)count, found[i], expected);
                return 1;
            }
            words += 2 * count;
            const int64_t next = (words - 1) % WORDS + 1;
            if (state.next != (uint64_t)next || state.left != WORDS + 1 - next) return printf("state behind %d words\n", (int)words), 4;
        }
    }
    for (double x = 0x1p-53; x <= 1; x += x < 1e-3 ? x / 3 : 1e-4) {
        if (std::fabs(log_of(x) - std::log(x)) > 4e-16 * std::fabs(std::log(x))) return printf("log of %g\n", x), 3;
    }
    return 0;
}
