// radix_sort: a stable sort of 64-bit keys, digit by digit from the lowest; digits in which all agree cost nothing.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace kvstrata::cpu {

struct Keyed {
    uint64_t key;
    int32_t item;
    int32_t part;
};

// An order of floats as unsigned integers; -0 is 0, every NaN above all.
inline uint32_t ordered(float x) {
    if (x != x) return ~uint32_t{0};
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (bits == 0x80000000u) bits = 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline uint64_t ordered(double x) {
    if (x != x) return ~uint64_t{0};
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    constexpr uint64_t kSign = uint64_t{1} << 63;
    if (bits == kSign) bits = 0;
    return bits & kSign ? ~bits : bits | kSign;
}

// Sorts by rising key. Returns where the result is: one of the two buffers of n.
inline Keyed* radix_sort(Keyed* from, Keyed* to, int64_t n) {
    constexpr int kDigit = 11, kPasses = 6;
    constexpr uint64_t kMask = (1u << kDigit) - 1;
    uint32_t count[kPasses][kMask + 1] = {};
    for (int64_t i = 0; i < n; ++i) {
        for (int d = 0; d < kPasses; ++d) ++count[d][from[i].key >> d * kDigit & kMask];
    }
    for (int d = 0; d < kPasses; ++d) {
        const int shift = d * kDigit;
        if (!n || count[d][from[0].key >> shift & kMask] == n) continue;
        uint32_t at = 0;
        for (uint32_t& c : count[d]) at += std::exchange(c, at);
        for (int64_t i = 0; i < n; ++i) to[count[d][from[i].key >> shift & kMask]++] = from[i];
        std::swap(from, to);
    }
    return from;
}

}  // namespace kvstrata::cpu
