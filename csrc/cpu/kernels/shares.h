// Quantized pages under attend: where things lie, and p * scale of their values as whole numbers.
#pragma once

#include "cpu/kernels/softmax.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr float kMost = 32639.0f;  // largest n: 127 * 257, two signed bytes of it fit where a kernel wants bytes
constexpr float kLeast = 7.888609052210118e-31f;  // 2^-100: queries and shares p below it count as zero
constexpr float kLeastScale = 1e-36f;             // no code has a smaller scale

template <Format F>
constexpr int kBits = format_bits(F);
template <Format F>
constexpr int kShare = 8 / kBits<F>;  // codes in a byte

// Where things lie in a page (common/layout.h).
template <Format F>
KV_INLINE int64_t half_page(const AttendTile& t) {
    return static_cast<int64_t>(kSlots) * t.head_dim * kBits<F> / 8;
}
KV_INLINE int64_t scale_bytes_of(const AttendTile& t) { return 2 * kSlots * (t.head_dim / t.group); }

KV_INLINE V magnitude(V x) { return bits_and(x, 0x7FFFFFFFu); }

// The scales of V of a block, of slots that some row reads, as shares of the largest of their group.
struct Shares {
    float of[kBlock][kMaxGroups][kSlots];  // 0 where no row reads the slot or its scale is not finite
    float most[kMaxGroups];
    uint16_t bad[kBlock][kMaxGroups];  // slots whose scale is not finite
};
KV_INLINE void find_shares(Shares& shares, const AttendTile& t, const PageBlock& b, int64_t scales, int count) {
    V most[kMaxGroups];
    for (int g = 0; g < count; ++g) most[g] = zero();
    for (int j = 0; j < b.count; ++j) {
        uint16_t read = 0;
        for (int row = 0; row < t.rows; ++row) read |= mask_of(t, row, j);
        for (int g = 0; g < count; ++g) {
            const V s = load_bf16(b.pages[j] + scales + g * kSlots * 2);
            const uint16_t finite = less(magnitude(s), set1(__builtin_inff()));
            const V plain = blend(read & finite, s, zero());
            shares.bad[j][g] = static_cast<uint16_t>(~finite);
            store(shares.of[j][g], plain);
            most[g] = max(magnitude(plain), most[g]);
        }
    }
    for (int g = 0; g < count; ++g) {
        shares.most[g] = max_lane(most[g]);
        const V inverse = set1(shares.most[g] >= kLeastScale ? 1.0f / shares.most[g] : 0.0f);
        for (int j = 0; j < b.count; ++j) store(shares.of[j][g], mul(load(shares.of[j][g]), inverse));
    }
}

// p * scale of a row's slots in group g as numbers to be rounded, up to kMost: sigma * parts[page]. Returns sigma, one for a
// block, whose pages share their sums: 128 slots of 32639 * 127 stay below 2^30. NaN where p or a scale that is read is.
KV_INLINE float weigh(V (&parts)[kBlock], const AttendTile& t, const PageBlock& b, int row, int g,
                      const Shares& shares) {
    V largest = zero();
    bool bad = false;
    for (int j = 0; j < b.count; ++j) {
        const V p = load(t.p + lanes_at(row, j));
        parts[j] = mul(p, load(shares.of[j][g]));
        largest = max(magnitude(parts[j]), largest);
        bad |= differ(p, p) || (shares.bad[j][g] & mask_of(t, row, j));
    }
    const float most = max_lane(largest);
    const V inverse = set1(most >= kLeast ? kMost / most : 0.0f);
    for (int j = 0; j < b.count; ++j) parts[j] = bad ? zero() : mul(parts[j], inverse);
    return bad ? __builtin_nanf("") : most * shares.most[g] * (1.0f / kMost);
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
