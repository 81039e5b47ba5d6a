// I as sixteen words and loops: every architecture.
#pragma once

namespace kvstrata::cpu::KV_ISA {
namespace {

struct I {
    int32_t x[16];
};
constexpr int kQkWide = 1;  // pages whose logits are summed at a time: kTile x kQkWide accumulators
constexpr int kPvWide = 1;  // groups of sixteen dims that PV sums at a time, likewise

#define KV_LANES(type, expression)                      \
    type r;                                             \
    for (int i = 0; i < 16; ++i) r.x[i] = (expression); \
    return r
KV_INLINE I none() { return {}; }
KV_INLINE I load_line(const void* p) {
    I r;
    __builtin_memcpy(r.x, p, 64);
    return r;
}
KV_INLINE void store_line(void* p, I a) { __builtin_memcpy(p, a.x, 64); }
KV_INLINE I add(I a, I b) { KV_LANES(I, a.x[i] + b.x[i]); }
KV_INLINE I low_nibbles(I a) { KV_LANES(I, a.x[i] & 0x0F0F0F0F); }  // of every byte
KV_INLINE I high_nibbles(I a) { KV_LANES(I, a.x[i] >> 4 & 0x0F0F0F0F); }
KV_INLINE V to_f32(I a) { KV_LANES(V, static_cast<float>(a.x[i])); }

// What the Bits bits from Shift on of each word stand for, in units of the scale.
template <int Bits, int Shift>
KV_INLINE float value_of(uint32_t word) {
    if constexpr (Bits == 2) return static_cast<float>(2 * static_cast<int32_t>(word >> Shift & 3u) - 3);
    return static_cast<float>(static_cast<int32_t>(word << (32 - Bits - Shift)) >> (32 - Bits));
}
template <int Bits, int Shift>
KV_INLINE V code_value(I line) {
    KV_LANES(V, (value_of<Bits, Shift>(static_cast<uint32_t>(line.x[i]))));
}

KV_INLINE uint32_t half_word(int32_t word, int half) { return static_cast<uint32_t>(word) >> 16 * half & 0xFFFF; }
// The codes of field K, sign-extended; of two bits, what they stand for: 2c - 3.
template <int Bits, int K>
KV_INLINE int32_t code_of(uint32_t half) {
    const int32_t code = static_cast<int32_t>(half >> (Bits * K) & ((1u << Bits) - 1));
    return Bits == 2 ? 2 * code - 3 : code - (code >> (Bits - 1) << Bits);
}
template <int Bits, int K>
KV_INLINE I field(I line) {
    I r;
    for (int i = 0; i < 16; ++i) {
        const uint32_t low = static_cast<uint32_t>(code_of<Bits, K>(half_word(line.x[i], 0)));
        const uint32_t high = static_cast<uint32_t>(code_of<Bits, K>(half_word(line.x[i], 1)));
        r.x[i] = static_cast<int32_t>((low & 0xFFFF) | high << 16);
    }
    return r;
}

// Two numbers that every lane of codes meets.
struct Pair {
    int32_t low, high;
};
KV_INLINE Pair spread(const int16_t* pair) { return {pair[0], pair[1]}; }
// sum + codes . pair in every lane, exact.
KV_INLINE I dot(I sum, I codes, Pair pair) {
    KV_LANES(I, sum.x[i] + static_cast<int16_t>(half_word(codes.x[i], 0)) * pair.low +
                    static_cast<int16_t>(half_word(codes.x[i], 1)) * pair.high);
}

// Sixteen numbers below 2^15, rounded to nearest even, each quad in the order 0, 2, 1, 3.
KV_INLINE void store_quads(int16_t* to, V x) {
    const V n = round_even(x);
    for (int i = 0; i < 16; i += 4) {
        to[i] = static_cast<int16_t>(n.x[i]);
        to[i + 1] = static_cast<int16_t>(n.x[i + 2]);
        to[i + 2] = static_cast<int16_t>(n.x[i + 1]);
        to[i + 3] = static_cast<int16_t>(n.x[i + 3]);
    }
}
#undef KV_LANES

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
