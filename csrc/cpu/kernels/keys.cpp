// The keys of a page as f32 [dim][16 slots], whatever its format, and sums over them. Lanes are slots: what a hidden slot
// holds stays in its own lane.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr int kSums = 4;  // independent ones, to hide the latency of an addition

template <Format F>
void widen_full(const unsigned char* page, const uint16_t*, int32_t dim, int32_t, const float*, float* k) {
    if constexpr (F == Format::f32) {
        __builtin_memcpy(k, page, static_cast<unsigned long>(dim) * kSlots * 4);
    } else {
        V first, second;
        for (int d = 0; d < dim; d += 2) {  // where dim is odd, its padding follows: k has room for it
            if constexpr (F == Format::bf16) {
                pairs_bf16(page + d * 32, first, second);
            } else {
                pairs_f16(page + d * 32, first, second);
            }
            store(k + d * kSlots, first);
            store(k + (d + 1) * kSlots, second);
        }
    }
}

// The value that the field at `shift` of a word stands for, in units of the scale.
template <int Bits>
KV_INLINE float code_value(uint32_t word, int shift) {
    if constexpr (Bits == 2) return static_cast<float>(2 * static_cast<int32_t>(word >> shift & 3u) - 3);
    return static_cast<float>(static_cast<int32_t>(word << (32 - Bits - shift)) >> (32 - Bits));
}

// A word holds, for its slot, 4 * (8 / Bits) dims: dim 4 f + j of them in the field f of byte j.
template <int Bits>
void widen_codes(const unsigned char* page, const uint16_t* scales, int32_t dim, int32_t group, const float* centre,
                 float* k) {
    constexpr int kFields = 8 / Bits;
    uint32_t words[kSlots];
    float values[kSlots];
    for (int first = 0; first < dim; first += 4 * kFields, page += 4 * kSlots) {
        __builtin_memcpy(words, page, sizeof words);
        for (int i = 0; i < 4 * kFields; ++i) {
            const int d = first + i, shift = 8 * (i % 4) + Bits * (i / 4);
            for (int slot = 0; slot < kSlots; ++slot) values[slot] = code_value<Bits>(words[slot], shift);
            V x = mul(load_bf16(scales + d / group * kSlots), load(values));
            if (centre) x = add(x, set1(centre[d]));
            store(k + d * kSlots, x);
        }
    }
}

void square_keys(const float* k, int32_t dim, float* squares) {
    V sum[kSums] = {zero(), zero(), zero(), zero()};
    for (int d = 0; d < dim; ++d) {
        const V x = load(k + d * kSlots);
        sum[d % kSums] = fma(x, x, sum[d % kSums]);
    }
    store(squares, add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

void dot_keys(const float* k, const float* x, int32_t dim, float* dots) {
    V sum[kSums] = {zero(), zero(), zero(), zero()};
    for (int d = 0; d < dim; ++d) sum[d % kSums] = fma(load(k + d * kSlots), set1(x[d]), sum[d % kSums]);
    store(dots, add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

void sum_keys(const float* k, const float* weight, uint16_t slots, int32_t dim, float* sums) {
    const V w = load(weight);
    for (int d = 0; d < dim; ++d) {
        const V old = load(sums + d * kSlots);
        store(sums + d * kSlots, blend(slots, fma(load(k + d * kSlots), w, old), old));
    }
}

}  // namespace

void fill_keys(Kernels* table) {
    table->widen_keys[0] = widen_full<Format::f32>;
    table->widen_keys[1] = widen_full<Format::bf16>;
    table->widen_keys[2] = widen_full<Format::f16>;
    table->widen_keys[3] = widen_codes<8>;
    table->widen_keys[4] = widen_codes<4>;
    table->widen_keys[5] = widen_codes<2>;
    table->square_keys = square_keys;
    table->dot_keys = dot_keys;
    table->sum_keys = sum_keys;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_keys(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
