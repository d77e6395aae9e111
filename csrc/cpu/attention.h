// Softmax attention in bf16 for x86 CPUs, forward only: keys stream past a block of queries, whose running maxima and sums,
// like all products, are in fp32; the softmax is in base 2. Included by one file for each instruction set, which gives `Tile`:
//
//   ROWS       queries that a tile holds; DEPTH: numbers of a head that it multiplies at a time
//   queries    the queries, as scores reads them
//   scores     S[ROWS, 32] = Q[ROWS, d] K[32, d]^T
//   values     O[ROWS, :] = O * decay + P[ROWS, n] V[n, :]
//
// Both read packed operands, in pairs of 16-bit numbers as the CPU's instructions want them: keys as [d / 2][32 keys][2], for
// each panel of 32 keys, values as [n / 2][columns][2].
#pragma once

#include <stdlib.h>

#include "vectors.h"

namespace {

constexpr int PANEL = 32;
constexpr int BLOCK_ELEMENTS = 16384;  // of keys, packed at a time: 32 KB, and as much of values
constexpr int MAX_KEYS = 256;          // in a block
constexpr int BLOCK_QUERIES = 384;     // of a task, which packs all keys for itself: 1/384 of the time of their products
constexpr float MASKED = -1e30f;       // finite, so that no difference of two is NaN

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline __mmask32 first_words(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

// 16 rows of 16 pairs -> 16 columns.
inline void transpose_pairs(__m512i x[16]) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
        x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
        x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
        x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
        x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
    }
}

// Keys [count, width] of token stride `token` -> panels of 32, zero behind `count` and up to `pairs` pairs of the width.
void pack_keys(const uint16_t *keys, int64_t token, int64_t count, int64_t width, int64_t pairs, uint32_t *packed) {
    for (int64_t first = 0; first < count; first += 16) {
        uint32_t *panel = packed + first / PANEL * pairs * PANEL + first % PANEL;
        for (int64_t pair = 0; pair < pairs; pair += 16) {
            __m512i x[16];
            const __mmask32 inside = first_words(width - 2 * pair);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const __mmask32 mask = first + i < count ? inside : 0;
                x[i] = _mm512_maskz_loadu_epi16(mask, keys + (first + i) * token + 2 * pair);
            }
            transpose_pairs(x);
            for (int i = 0; i < 16 && pair + i < pairs; i++) _mm512_storeu_si512(panel + (pair + i) * PANEL, x[i]);
        }
    }
    if (round_up(count, 16) % PANEL) {
        uint32_t *panel = packed + count / PANEL * pairs * PANEL + 16;
        for (int64_t pair = 0; pair < pairs; pair++) _mm512_storeu_si512(panel + pair * PANEL, _mm512_setzero_si512());
    }
}

// Values [count, width] -> pairs of tokens [count / 2][columns][2], zero up to a multiple of 32 tokens and `columns`.
void pack_values(const uint16_t *values, int64_t token, int64_t count, int64_t width, int64_t columns, uint32_t *packed) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 16; i++) {
        low[2 * i] = i, low[2 * i + 1] = 32 + i;
        high[2 * i] = 16 + i, high[2 * i + 1] = 48 + i;
    }
    const __m512i lower = _mm512_load_si512(low), upper = _mm512_load_si512(high);
    for (int64_t n = 0; n < round_up(count, PANEL); n += 2, packed += columns) {
        for (int64_t column = 0; column < columns; column += 32) {
            const __mmask32 inside = first_words(width - column);
            const uint16_t *from = values + n * token + column;
            const __m512i a = _mm512_maskz_loadu_epi16(n < count ? inside : 0, from);
            const __m512i b = _mm512_maskz_loadu_epi16(n + 1 < count ? inside : 0, from + token);
            _mm512_storeu_si512(packed + column, _mm512_permutex2var_epi16(a, lower, b));
            if (column + 16 < columns) _mm512_storeu_si512(packed + column + 16, _mm512_permutex2var_epi16(a, upper, b));
        }
    }
}

struct Queries {
    const uint16_t *data;
    int64_t token;
};

struct Row {  // running softmax of one query
    float largest, sum, decay;
};

// Scores [n] of one query -> weights relative to the largest so far, in bf16; n a multiple of 32.
inline void soften(const float *scores, uint16_t *weights, int64_t n, float scale_log2, float bonus, Row &row) {
    __m512 most = _mm512_loadu_ps(scores), other = _mm512_loadu_ps(scores + 16);
    for (int64_t i = 32; i < n; i += 32) {
        most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
        other = _mm512_max_ps(other, _mm512_loadu_ps(scores + i + 16));
    }
    const float found = _mm512_reduce_max_ps(_mm512_max_ps(most, other)) * scale_log2 + bonus;
    const float largest = found > row.largest ? found : row.largest;
    const __m512 scale = _mm512_set1_ps(scale_log2), shift = _mm512_set1_ps(bonus - largest);
    __m512 sum = _mm512_setzero_ps(), more = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 32) {
        const __m512 a = exp2_vector(_mm512_fmadd_ps(_mm512_loadu_ps(scores + i), scale, shift));
        const __m512 b = exp2_vector(_mm512_fmadd_ps(_mm512_loadu_ps(scores + i + 16), scale, shift));
        sum = _mm512_add_ps(sum, a);
        more = _mm512_add_ps(more, b);
        _mm512_storeu_si512(weights + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    row.decay = _mm512_cvtss_f32(exp2_vector(_mm512_set1_ps(row.largest - largest)));
    row.sum = row.sum * row.decay + _mm512_reduce_add_ps(_mm512_add_ps(sum, more));
    row.largest = largest;
}

// Buffers of one thread.
template <class Tile>
struct Space {
    int64_t pairs, columns, keys;  // of a packed key, of a packed value, and at most in a block
    uint32_t *packed_keys, *packed_values;
    float *scores, *out;
    uint16_t *weights, *queries;
    Row *rows;
    char *memory;

    explicit Space(int64_t head_dim) {
        columns = round_up(head_dim, 16);
        pairs = round_up(head_dim, Tile::DEPTH) / 2;
        keys = BLOCK_ELEMENTS / columns / PANEL * PANEL;
        keys = keys < PANEL ? PANEL : keys > MAX_KEYS ? MAX_KEYS : keys;
        const int64_t sizes[] = {keys * pairs * 4, keys * columns * 2, Tile::ROWS * keys * 4, BLOCK_QUERIES * columns * 4,
                                 Tile::ROWS * keys * 2, Tile::ROWS * pairs * 4, BLOCK_QUERIES * (int64_t)sizeof(Row)};
        int64_t total = 0;
        for (int64_t size : sizes) total += round_up(size, 64);
        memory = (char *)aligned_alloc(64, total);
        char *next = memory;
        void **places[] = {(void **)&packed_keys, (void **)&packed_values, (void **)&scores, (void **)&out, (void **)&weights,
                           (void **)&queries,     (void **)&rows};
        for (int i = 0; i < 7 && memory; i++) *places[i] = next, next += round_up(sizes[i], 64);
    }
    ~Space() { free(memory); }
};

// One block of keys, all of one range, for all queries of a task.
template <class Tile>
void add_keys(const Attention &a, const uint16_t *q, int64_t queries, const uint16_t *k, const uint16_t *v, int64_t count,
              float bonus, Space<Tile> &space) {
    pack_keys(k, a.k.token, count, a.head_dim, space.pairs, space.packed_keys);
    pack_values(v, a.v.token, count, a.head_dim, space.columns, space.packed_values);
    const int64_t padded = round_up(count, PANEL);
    for (int64_t first = 0; first < queries; first += Tile::ROWS) {
        const int rows = queries - first < Tile::ROWS ? (int)(queries - first) : Tile::ROWS;
        const Queries tile = Tile::queries(rows, q + first * a.q.token, a.q.token, a.head_dim, space.pairs, space.queries);
        for (int64_t panel = 0; panel < padded; panel += PANEL) {
            Tile::scores(rows, tile, a.head_dim, space.packed_keys + panel * space.pairs, space.scores + panel, padded);
        }
        for (int row = 0; row < rows; row++) {
            float *scores = space.scores + row * padded;
            for (int64_t i = count; i < padded; i++) scores[i] = MASKED;
            soften(scores, space.weights + row * padded, padded, a.scale_log2, bonus, space.rows[first + row]);
        }
        Tile::values(rows, space.weights, padded, space.packed_values, space.columns, space.rows + first,
                     space.out + first * space.columns);
    }
}

// One task: a block of queries of one row and head, over all keys.
template <class Tile>
void attend(const Attention &a, int64_t row, int64_t head, int64_t first, Space<Tile> &space) {
    const int64_t queries = a.queries - first < BLOCK_QUERIES ? a.queries - first : BLOCK_QUERIES;
    const uint16_t *q = a.q.data + row * a.q.row + head * a.q.head + first * a.q.token;
    const uint16_t *k = a.k.data + row * a.k.row + head * a.k.head, *v = a.v.data + row * a.v.row + head * a.v.head;
    memset(space.out, 0, queries * space.columns * sizeof(float));
    for (int64_t i = 0; i < queries; i++) space.rows[i] = {MASKED, 0.0f, 0.0f};
    for (int64_t range = 0; range < a.num_ranges; range++) {
        const int64_t stop = a.ranges[2 * range + 1];
        for (int64_t n = a.ranges[2 * range]; n < stop; n += space.keys) {
            const int64_t count = stop - n < space.keys ? stop - n : space.keys;
            add_keys(a, q, queries, k + n * a.k.token, v + n * a.v.token, count, range ? 0.0f : a.bonus, space);
        }
    }
    uint16_t *out = a.out + ((row * a.queries + first) * a.heads + head) * a.head_dim;
    for (int64_t i = 0; i < queries; i++, out += a.heads * a.head_dim) {
        const __m512 inverse = _mm512_set1_ps(1.0f / space.rows[i].sum);
        for (int64_t column = 0; column < a.head_dim; column += 16) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(space.out + i * space.columns + column), inverse);
            store(out + column, first_lanes(a.head_dim - column), x);
        }
    }
}

// 0, or 1 where memory is wanting.
template <class Tile>
int run(const Attention &a, Threads threads) {
    const int64_t blocks = (a.queries + BLOCK_QUERIES - 1) / BLOCK_QUERIES;
    return share_out(a.rows * a.heads * blocks, threads, [&](Tasks &tasks) {
        Space<Tile> space(a.head_dim);
        if (!space.memory) return 1;
        Tile::begin();
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t row_head = task / blocks;
            attend<Tile>(a, row_head / a.heads, row_head % a.heads, task % blocks * BLOCK_QUERIES, space);
        }
        Tile::end();
        return 0;
    });
}

}  // namespace
