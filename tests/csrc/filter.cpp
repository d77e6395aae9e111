// Filters rows by csrc/cpu/filter.cpp and by a sort in fp64; compiled with sanitizers. Prints nothing and returns 0 if all agree.
#include "../../csrc/cpu/filter.cpp"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

// As `filter_logits` says. False where a sum is too near to p to tell.
static bool expect(std::vector<float> &row, int64_t top_k, bool has_top_p, float removable) {
    std::vector<size_t> order(row.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return row[a] < row[b]; });
    const float best = row[order.back()];
    if (best == -INFINITY) return true;
    if (top_k) {
        const float lowest = row[order[row.size() - top_k]];
        for (float &x : row) x = x < lowest ? -INFINITY : x;
    }
    if (!has_top_p) return true;
    double total = 0, mass = 0;
    for (float x : row) total += exp((double)x - best);
    for (size_t i = 0; i + 1 < order.size(); i++) {
        mass += exp((double)row[order[i]] - best) / total;
        if (fabs(mass - removable) < 1e-6) return false;
        if (mass > removable) break;
        row[order[i]] = -INFINITY;
    }
    return true;
}

int main() {
    std::mt19937 random(0);
    int compared = 0;
    for (int64_t width : {1, 2, 7, 64, 1000}) {
        for (float spread : {0.5f, 3.0f, 20.0f}) {
            for (int kind = 0; kind < 4; kind++) {
                for (int64_t top_k : {(int64_t)0, (int64_t)1, width / 3}) {
                    for (float removable : {0.0f, 0.2f, 0.9f}) {
                        std::normal_distribution<float> normal(0, spread);
                        std::vector<float> rows(3 * width);
                        for (float &x : rows) x = kind == 1 ? roundf(normal(random)) : kind == 2 && random() % 3 ? 0.0f : normal(random);
                        if (kind == 2) rows[0] = -0.0f;
                        if (kind == 3) for (size_t i = 1; i < rows.size(); i += 2) rows[i] = i % 3 ? -1e30f : -INFINITY;
                        const bool has_top_p = removable > 0;
                        std::vector<float> found = rows;
                        const Filter filter = {found.data(), 3, width, top_k, has_top_p, removable};
                        if (hart_infer_cpu_filter(&filter, 1, nullptr)) return 2;
                        for (int64_t i = 0; i < 3; i++) {
                            std::vector<float> row(rows.begin() + i * width, rows.begin() + (i + 1) * width);
                            if (!expect(row, top_k, has_top_p, removable)) continue;
                            compared++;
                            if (std::equal(row.begin(), row.end(), found.begin() + i * width)) continue;
                            printf("width %d, spread %g, kind %d, top-k %d, removable %g\n", (int)width, spread, kind, (int)top_k, removable);
                            return 1;
                        }
                    }
                }
            }
        }
    }
    std::vector<float> bad = {1, NAN, 2, INFINITY, 0, 1, -INFINITY, -INFINITY, -INFINITY};
    std::vector<float> found = bad;
    const Filter filter = {found.data(), 3, 3, 1, 1, 0.5f};
    if (hart_infer_cpu_filter(&filter, 1, nullptr) || memcmp(bad.data(), found.data(), 9 * sizeof(float))) return 3;
    return compared < 1000 ? 4 : 0;
}
