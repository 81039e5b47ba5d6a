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

// The finished logits of one row from its q . k in t.z: scaled, capped, biased, -inf where the slot is not read.
KV_INLINE V finish_logits(const AttendTile& t, int row) {
    V z = mul(load(t.z + row * kSlots), set1(t.scale));
    if (t.softcap > 0) z = mul(set1(t.softcap), tanh(div(z, set1(t.softcap))));
    if (t.bias) z = add(z, load(t.bias));
    z = blend(t.masks[row], z, set1(kMinusInf));
    store(t.z + row * kSlots, z);
    return z;
}

// The softmax step of one row: z finished, p and rescale for PV, running maximum and sum brought up to date.
KV_INLINE bool soften(const AttendTile& t, int row) {
    const V z = finish_logits(t, row);
    if (!differ(z, set1(kMinusInf))) return false;  // nothing read; NaN counts as something
    const float before = t.maximum[row];
    float rescale = 1.0f, lanes[16];
    if (less(set1(before), z)) {
        const float now = max_lane(z);
        store(lanes, exp(set1(before - now)));
        rescale = lanes[0];
        t.maximum[row] = now;
    }
    const V p = exp(sub(z, set1(t.maximum[row])));
    store(t.p + row * kSlots, p);
    store(t.sum + row * kSlots, fma(load(t.sum + row * kSlots), set1(rescale), p));
    t.rescale[row] = rescale;
    return true;
}

// All rows; t.live are the slots that PV reads. `other`: the accumulator that this page does not add to, or null.
KV_INLINE void soften_all(const AttendTile& t, float* other) {
    for (int row = 0; row < t.rows; ++row) {
        const bool live = soften(t, row);
        t.live[row] = live ? t.masks[row] : uint16_t{0};
        if (!live || !other || t.rescale[row] == 1.0f) continue;
        float* const acc = other + row * t.stride;
        for (int d = 0; d < t.stride; d += 16) store(acc + d, mul(load(acc + d), set1(t.rescale[row])));
    }
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
