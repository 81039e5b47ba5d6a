// V as sixteen floats and loops: every architecture. Also what the other levels are tested against.
#pragma once

#include <cstdint>

namespace kvstrata::cpu::KV_ISA {
namespace {

struct V {
    float x[16];
};
constexpr int kTile = 1, kChains = 2, kWide = 1;

KV_INLINE uint32_t bits_of(float f) { return __builtin_bit_cast(uint32_t, f); }
KV_INLINE float float_of(uint32_t b) { return __builtin_bit_cast(float, b); }

#define KV_LANES(expression)                            \
    V r;                                                \
    for (int i = 0; i < 16; ++i) r.x[i] = (expression); \
    return r
KV_INLINE V set1(float s) { KV_LANES(s); }
KV_INLINE V zero() { return set1(0.0f); }
KV_INLINE V load(const float* p) { KV_LANES(p[i]); }
KV_INLINE void store(float* p, V a) {
    for (int i = 0; i < 16; ++i) p[i] = a.x[i];
}
KV_INLINE V add(V a, V b) { KV_LANES(a.x[i] + b.x[i]); }
KV_INLINE V sub(V a, V b) { KV_LANES(a.x[i] - b.x[i]); }
KV_INLINE V mul(V a, V b) { KV_LANES(a.x[i] * b.x[i]); }
KV_INLINE V div(V a, V b) { KV_LANES(a.x[i] / b.x[i]); }
KV_INLINE V fma(V a, V b, V c) { KV_LANES(a.x[i] * b.x[i] + c.x[i]); }
// The second operand if either is NaN, as the vector instructions have it.
KV_INLINE V max(V a, V b) { KV_LANES(a.x[i] > b.x[i] ? a.x[i] : b.x[i]); }
KV_INLINE V min(V a, V b) { KV_LANES(a.x[i] < b.x[i] ? a.x[i] : b.x[i]); }
KV_INLINE uint16_t less(V a, V b) {
    int bits = 0;
    for (int i = 0; i < 16; ++i) bits |= (a.x[i] < b.x[i]) << i;
    return static_cast<uint16_t>(bits);
}
KV_INLINE uint16_t differ(V a, V b) {  // NaN differs
    int bits = 0;
    for (int i = 0; i < 16; ++i) bits |= (a.x[i] != b.x[i]) << i;
    return static_cast<uint16_t>(bits);
}
KV_INLINE V blend(uint16_t bits, V yes, V no) { KV_LANES(bits >> i & 1 ? yes.x[i] : no.x[i]); }
KV_INLINE float max_lane(V a) {
    float m = a.x[0];
    for (int i = 1; i < 16; ++i) m = m > a.x[i] ? m : a.x[i];
    return m;
}
// Adding and taking away 1.5 * 2^23 rounds to nearest even for |a| < 2^22; callers are far inside.
KV_INLINE V round_even(V a) { KV_LANES((a.x[i] + 12582912.0f) - 12582912.0f); }
// y * 2^n for integral n in -127..128 (2^n is 0 and inf at the ends); anything for NaN.
KV_INLINE V scale2(V y, V n) {
    KV_LANES(y.x[i] *
             float_of(static_cast<uint32_t>((n.x[i] >= -127.0f && n.x[i] <= 128.0f ? int(n.x[i]) : 0) + 127) << 23));
}
KV_INLINE V bits_and(V a, uint32_t m) { KV_LANES(float_of(bits_of(a.x[i]) & m)); }
KV_INLINE V bits_or(V a, V b) { KV_LANES(float_of(bits_of(a.x[i]) | bits_of(b.x[i]))); }
// Lane i and lane i ^ Stride change places.
template <int Stride>
KV_INLINE V swap(V a) {
    KV_LANES(a.x[i ^ Stride]);
}
KV_INLINE V negate(uint16_t bits, V a) { KV_LANES(bits >> i & 1 ? -a.x[i] : a.x[i]); }
// Sixteen signed bytes; stored from integral lanes in -128..127.
KV_INLINE V load_i8(const void* p) { KV_LANES(static_cast<float>(static_cast<const signed char*>(p)[i])); }
// Sixteen bytes less 128.
KV_INLINE V load_code(const void* p) {
    KV_LANES(static_cast<float>(static_cast<int>(static_cast<const unsigned char*>(p)[i]) - 128));
}
KV_INLINE void store_i8(void* p, V a) {
    for (int i = 0; i < 16; ++i) static_cast<signed char*>(p)[i] = static_cast<signed char>(a.x[i]);
}
KV_INLINE void prefetch(const void*) {}

KV_INLINE float widen_f16(uint32_t h) {
    const uint32_t sign = (h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3FF;
    if (exponent == 31) return float_of(sign | 0x7F800000 | fraction << 13 | (fraction ? 0x400000 : 0));
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = static_cast<float>(fraction) * (1.0f / 16777216.0f);
    return float_of(bits_of(small) | sign);
}
KV_INLINE uint16_t round_f16(float f) {
    const uint32_t b = bits_of(f), sign = b >> 16 & 0x8000, magnitude = b & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
    if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to 2^16 or more
    if (magnitude < 0x38800000) {  // below 2^-14: a subnormal; adding 0.5 leaves its rounded bits at the end
        return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13));
}
KV_INLINE uint16_t round_bf16(float f) {
    const uint32_t b = bits_of(f);
    if ((b & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>((b | 0x400000) >> 16);
    return static_cast<uint16_t>((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}
KV_INLINE uint32_t element(const void* p, int i) {
    uint16_t h;
    __builtin_memcpy(&h, static_cast<const char*>(p) + 2 * i, 2);
    return h;
}
KV_INLINE void set_element(void* p, int i, uint16_t h) { __builtin_memcpy(static_cast<char*>(p) + 2 * i, &h, 2); }

// Sixteen 16-bit elements.
KV_INLINE V load_bf16(const void* p) { KV_LANES(float_of(element(p, i) << 16)); }
KV_INLINE V load_f16(const void* p) { KV_LANES(widen_f16(element(p, i))); }
KV_INLINE void store_bf16(void* p, V a) {
    for (int i = 0; i < 16; ++i) set_element(p, i, round_bf16(a.x[i]));
}
KV_INLINE void store_f16(void* p, V a) {
    for (int i = 0; i < 16; ++i) set_element(p, i, round_f16(a.x[i]));
}

// A 64-byte line of sixteen pairs: the first elements, the second elements.
KV_INLINE void pairs_bf16(const void* line, V& first, V& second) {
    for (int i = 0; i < 16; ++i) {
        first.x[i] = float_of(element(line, 2 * i) << 16);
        second.x[i] = float_of(element(line, 2 * i + 1) << 16);
    }
}
KV_INLINE void pairs_f16(const void* line, V& first, V& second) {
    for (int i = 0; i < 16; ++i) {
        first.x[i] = widen_f16(element(line, 2 * i));
        second.x[i] = widen_f16(element(line, 2 * i + 1));
    }
}

// to[line][i] = from[i][line] for a block of 16 x 16 32-bit words; from[i] at byte `offset`, lines 64 bytes apart.
KV_INLINE void transpose(const void* const* from, int64_t offset, void* to) {
    for (int i = 0; i < 16; ++i) {
        for (int line = 0; line < 16; ++line) {
            __builtin_memcpy(static_cast<char*>(to) + 64 * line + 4 * i,
                             static_cast<const char*>(from[i]) + offset + 4 * line, 4);
        }
    }
}
#undef KV_LANES

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
