// What pages of every format share under window queries: the register tile of query rows, finished logits.
#pragma once

#include "common/layout.h"
#include "cpu/kernels/math.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

// Rows of a register tile: each needs an accumulator, and in quantized pages with several groups a second one. Their
// additions are independent, which hides the latency of one.
#if defined(KV_ISA_scalar)
constexpr int kWindowRows = 1;
#elif defined(KV_ISA_avx2)
constexpr int kWindowRows = 4;
#else
constexpr int kWindowRows = 8;
#endif

constexpr float kUnread = -__builtin_inff();

// Finishes a tile of raw logits from `row` on: scaled, capped, -inf where not read.
KV_INLINE void finish_tile(const WindowTile& t, int row, const V (&dots)[kWindowRows]) {
    for (int n = 0; n < kWindowRows; ++n) {
        V z = mul(dots[n], set1(t.scale));
        if (t.softcap > 0) z = mul(set1(t.softcap), tanh(div(z, set1(t.softcap))));
        z = blend(t.masks[row + n], z, set1(kUnread));
        float* const most = t.maximum + (row + n) * kSlots;
        store(t.z + (row + n) * kSlots, z);
        store(most, max(z, load(most)));  // the old one where z is NaN
    }
}

// Of the next page, the share of one register tile: all lines at once would wait for each other.
KV_INLINE void prefetch_share(const WindowTile& t, int row, const unsigned char* ahead, int64_t bytes) {
    if (!ahead) return;
    const int64_t lines = (bytes + 63) / 64, tiles = t.rows / kWindowRows, tile = row / kWindowRows;
    for (int64_t i = lines * tile / tiles; i < lines * (tile + 1) / tiles; ++i) prefetch(ahead + 64 * i);
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
