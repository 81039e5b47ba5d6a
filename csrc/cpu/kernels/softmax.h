// What pages of every format share in attend: register tiles of query rows, finished logits, the online softmax.
#pragma once

#include "common/layout.h"
#include "cpu/kernels/math.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr float kMinusInf = -__builtin_inff();

// Calls call(Rows<n>) for the n <= kTile rows of a register tile.
template <int N>
struct Rows {
    static constexpr int n = N;
};
template <class Call>
KV_INLINE void with_rows(int n, Call call) {
    if constexpr (kTile >= 4) {
        if (n == 4) return call(Rows<4>{});
        if (n == 3) return call(Rows<3>{});
    }
    if constexpr (kTile >= 2) {
        if (n == 2) return call(Rows<2>{});
    }
    call(Rows<1>{});
}

// Where the lanes of a row and a page of the block lie in t.z and t.p, and its mask in t.masks.
KV_INLINE int lanes_at(int row, int page) { return (row * kBlock + page) * kSlots; }
KV_INLINE uint16_t mask_of(const AttendTile& t, int row, int page) { return t.masks[row * kBlock + page]; }

// How many live rows from `row` on, a live one, up to a register tile, read the same slots of a block.
KV_INLINE int rows_alike(const AttendTile& t, const PageBlock& b, int row) {
    int n = 1;
    for (; n < kTile && row + n < t.rows && t.live[row + n]; ++n) {
        for (int j = 0; j < b.count; ++j) {
            if (mask_of(t, row, j) != mask_of(t, row + n, j)) return n;
        }
    }
    return n;
}

// The softmax step of one row over a block: from q . k in t.z to finished logits (scaled, capped, biased, -inf where the
// slot is not read), p and rescale for PV, running maximum and sum brought up to date. False if nothing was read.
KV_INLINE bool soften(const AttendTile& t, const PageBlock& b, int row) {
    V most = set1(kMinusInf);
    uint16_t read = 0;
    for (int j = 0; j < b.count; ++j) {
        float* const at = t.z + lanes_at(row, j);
        V z = mul(load(at), set1(t.scale));
        if (t.softcap > 0) z = mul(set1(t.softcap), tanh(div(z, set1(t.softcap))));
        if (b.bias[j]) z = add(z, load(b.bias[j]));
        z = blend(mask_of(t, row, j), z, set1(kMinusInf));
        store(at, z);
        read |= differ(z, set1(kMinusInf));  // NaN counts as something
        most = max(z, most);                 // passes over NaN
    }
    t.rescale[row] = 1.0f;
    if (!read) return false;
    const float before = t.maximum[row];
    if (less(set1(before), most)) {
        const float now = max_lane(most);
        float lanes[16];
        store(lanes, exp(set1(before - now)));
        t.rescale[row] = lanes[0];
        t.maximum[row] = now;
    }
    const V maximum = set1(t.maximum[row]);
    V sum = mul(load(t.sum + row * kSlots), set1(t.rescale[row]));
    for (int j = 0; j < b.count; ++j) {
        const V p = exp(sub(load(t.z + lanes_at(row, j)), maximum));
        store(t.p + lanes_at(row, j), p);
        sum = add(sum, p);
    }
    store(t.sum + row * kSlots, sum);
    return true;
}

KV_INLINE void rescale_row(float* acc, int row, int stride, float by) {
    if (by == 1.0f) return;
    for (int d = 0; d < stride; d += 16) store(acc + row * stride + d, mul(load(acc + row * stride + d), set1(by)));
}

// All rows; t.live says which of them read something. `other`: the accumulator that this block does not add to, or null.
KV_INLINE void soften_all(const AttendTile& t, const PageBlock& b, float* other) {
    for (int row = 0; row < t.rows; ++row) {
        t.live[row] = soften(t, b, row);
        if (other) rescale_row(other, row, t.stride, t.rescale[row]);
    }
}

// Prefetches the pages ahead of a block line by line, in step with the work, so that memory is never idle and no burst waits
// for the lines before it. In order of addresses: what memory serves best.
struct Ahead {
    const unsigned char* const* page;
    int64_t bytes;  // of a page
    const unsigned char* at = nullptr;
    const unsigned char* end = nullptr;

    inline __attribute__((always_inline)) void fetch(int lines) {
        for (int i = 0; i < lines; ++i) {
            if (at == end) {
                if (!*page) return;
                at = *page++;
                end = at + bytes;
            }
            prefetch(at);
            at += 64;
        }
    }
};

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
