// AMX's tiles in plain C++, for CPUs without them: included before csrc/cpu/attention_amx.cpp by -include.
#pragma once

#include <immintrin.h>  // whose own definitions go
#include <stdint.h>
#include <string.h>

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

#define HART_AMX_EMULATED 1

namespace amx {

struct Tile {
    alignas(64) uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local int configured = 0;

inline void load(int tile, const void *from, int64_t stride) {
    if (!configured) __builtin_trap();
    for (int i = 0; i < 16; i++) memcpy(tiles[tile].bytes[i], (const uint8_t *)from + i * stride, 64);
}

inline void store(int tile, void *to, int64_t stride) {
    if (!configured) __builtin_trap();
    for (int i = 0; i < 16; i++) memcpy((uint8_t *)to + i * stride, tiles[tile].bytes[i], 64);
}

inline float number(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

inline void multiply(int sums, int rows, int packed) {
    for (int m = 0; m < 16; m++) {
        for (int n = 0; n < 16; n++) {
            float sum;
            memcpy(&sum, tiles[sums].bytes[m] + 4 * n, 4);
            for (int k = 0; k < 32; k++) {
                sum += number(tiles[rows].bytes[m] + 2 * k) * number(tiles[packed].bytes[k / 2] + 4 * n + 2 * (k % 2));
            }
            memcpy(tiles[sums].bytes[m] + 4 * n, &sum, 4);
        }
    }
}

}  // namespace amx

#define _tile_loadconfig(shape) (amx::configured = (shape) != nullptr)
#define _tile_release() (amx::configured = 0)
#define _tile_zero(tile) memset(&amx::tiles[tile], 0, sizeof(amx::Tile))
#define _tile_loadd(tile, from, stride) amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) amx::store(tile, to, stride)
#define _tile_dpbf16ps(sums, rows, packed) amx::multiply(sums, rows, packed)
