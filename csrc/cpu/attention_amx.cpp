// Attention by AMX tiles: tdpbf16ps multiplies 16 rows of 32 numbers by 32 x 16 and adds to 16 x 16 sums in fp32.
#ifndef HART_AMX_EMULATED  // by tests/csrc/amx.h, on CPUs without tiles
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif
#include "attention.h"

namespace {

// 32 queries by 32 keys, then 32 by 32 columns: four tiles of sums (0 to 3), two of rows (4, 5), two packed (6, 7).
struct Amx {
    static constexpr int ROWS = 32, DEPTH = 32;

    static void begin() {
        alignas(64) struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        _tile_loadconfig(&shape);
    }
    static void end() { _tile_release(); }

    // Tiles are read whole: copy the queries to where rows and widths are full.
    static Queries queries(int rows, const uint16_t *q, int64_t token, int64_t width, int64_t pairs, uint16_t *room) {
        memset(room, 0, ROWS * pairs * 2 * sizeof(uint16_t));
        for (int row = 0; row < rows; row++) memcpy(room + row * pairs * 2, q + row * token, width * sizeof(uint16_t));
        return {room, pairs * 2};
    }

    static void scores(int, Queries q, int64_t width, const uint32_t *panel, float *out, int64_t stride) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t d = 0; d < width; d += DEPTH, panel += DEPTH / 2 * PANEL) {
            _tile_loadd(4, q.data + d, q.token * 2);
            _tile_loadd(5, q.data + 16 * q.token + d, q.token * 2);
            _tile_loadd(6, panel, PANEL * 4);
            _tile_loadd(7, panel + 16, PANEL * 4);
            multiply();
        }
        keep(out, stride);
    }

    static void values(int rows, const uint16_t *weights, int64_t keys, const uint32_t *values, int64_t columns, const Row *row,
                       float *out) {
        for (int i = 0; i < rows; i++) {
            const __m512 decay = _mm512_set1_ps(row[i].decay);
            for (float *at = out + i * columns; at < out + (i + 1) * columns; at += 16) {
                _mm512_storeu_ps(at, _mm512_mul_ps(decay, _mm512_loadu_ps(at)));
            }
        }
        int64_t column = 0;
        for (; columns - column >= 32; column += 32) both(weights, keys, values + column, columns, out + column);
        if (column < columns) left(weights, keys, values + column, columns, out + column);
    }

  private:
    static inline void keep(float *out, int64_t stride) {
        _tile_stored(0, out, stride * 4);
        _tile_stored(1, out + 16, stride * 4);
        _tile_stored(2, out + 16 * stride, stride * 4);
        _tile_stored(3, out + 16 * stride + 16, stride * 4);
    }

    static inline void multiply() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }

    static void both(const uint16_t *weights, int64_t keys, const uint32_t *values, int64_t columns, float *out) {
        _tile_loadd(0, out, columns * 4);
        _tile_loadd(1, out + 16, columns * 4);
        _tile_loadd(2, out + 16 * columns, columns * 4);
        _tile_loadd(3, out + 16 * columns + 16, columns * 4);
        for (int64_t n = 0; n < keys; n += DEPTH, values += DEPTH / 2 * columns) {
            _tile_loadd(4, weights + n, keys * 2);
            _tile_loadd(5, weights + 16 * keys + n, keys * 2);
            _tile_loadd(6, values, columns * 4);
            _tile_loadd(7, values + 16, columns * 4);
            multiply();
        }
        keep(out, columns);
    }

    static void left(const uint16_t *weights, int64_t keys, const uint32_t *values, int64_t columns, float *out) {
        _tile_loadd(0, out, columns * 4);
        _tile_loadd(2, out + 16 * columns, columns * 4);
        for (int64_t n = 0; n < keys; n += DEPTH, values += DEPTH / 2 * columns) {
            _tile_loadd(4, weights + n, keys * 2);
            _tile_loadd(5, weights + 16 * keys + n, keys * 2);
            _tile_loadd(6, values, columns * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
        }
        _tile_stored(0, out, columns * 4);
        _tile_stored(2, out + 16 * columns, columns * 4);
    }
};

}  // namespace

int attention_amx(const Attention &attention, Threads threads) { return run<Amx>(attention, threads); }
