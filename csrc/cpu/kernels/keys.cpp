// The keys of a page as f32 [dim][16 slots], whatever its format, and sums over them; their products with a vector. Lanes are slots: what a hidden slot
// holds stays in its own lane.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "common/layout.h"
#include "cpu/kernels/dot.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr int kSums = 4;  // independent ones, to hide the latency of an addition

struct Sums {
    V x[kSums];
};
KV_INLINE void clear(Sums& sums) {
    for (V& x : sums.x) x = zero();
}
KV_INLINE V total(const Sums& sums) { return add(add(sums.x[0], sums.x[1]), add(sums.x[2], sums.x[3])); }

// Two dims of all slots; where D is odd, padding follows the last.
template <Format F>
KV_INLINE void load_dims(const unsigned char* page, int d, V& first, V& second) {
    if constexpr (F == Format::f32) {
        first = load(reinterpret_cast<const float*>(page) + d * kSlots);
        second = load(reinterpret_cast<const float*>(page) + (d + 1) * kSlots);
    } else if constexpr (F == Format::bf16) {
        pairs_bf16(page + d * 32, first, second);
    } else {
        pairs_f16(page + d * 32, first, second);
    }
}

template <Format F>
void widen_full(const unsigned char* page, const uint16_t*, int32_t dim, int32_t, const float*, float* k,
                float* squares) {
    Sums sums;
    clear(sums);
    V first, second;
    for (int d = 0; d < dim; d += 2) {
        load_dims<F>(page, d, first, second);
        store(k + d * kSlots, first);
        store(k + (d + 1) * kSlots, second);  // k has room for it
        sums.x[d % kSums] = fma(first, first, sums.x[d % kSums]);
        if (d + 1 < dim) sums.x[(d + 1) % kSums] = fma(second, second, sums.x[(d + 1) % kSums]);
    }
    store(squares, total(sums));
}

template <Format F>
void dot_full(const unsigned char* page, const uint16_t*, int32_t dim, int32_t, const float* x, float* dots) {
    Sums sums;
    clear(sums);
    V first, second;
    for (int d = 0; d < dim; d += 2) {
        load_dims<F>(page, d, first, second);
        sums.x[d % kSums] = fma(first, set1(x[d]), sums.x[d % kSums]);
        if (d + 1 < dim) sums.x[(d + 1) % kSums] = fma(second, set1(x[d + 1]), sums.x[(d + 1) % kSums]);
    }
    store(dots, total(sums));
}

template <int Bits>
void widen_codes(const unsigned char* page, const uint16_t* scales, int32_t dim, int32_t group, const float* centre,
                 float* k, float* squares) {
    constexpr int kLineDims = 4 * (8 / Bits);
    Sums sums;
    clear(sums);
    V scale = zero();
    for (int d = 0, left = 0; d < dim; d += kLineDims, left -= kLineDims, page += 64) {
        if (left == 0) scale = load_bf16(scales), scales += kSlots, left = group;
        each_code<Bits, 0>(load_line(page), [&](int i, V code) __attribute__((always_inline)) {
            const V x = centre ? fma(scale, code, set1(centre[d + i])) : mul(scale, code);
            store(k + (d + i) * kSlots, x);
            sums.x[i % kSums] = fma(x, x, sums.x[i % kSums]);
        });
    }
    store(squares, total(sums));
}

template <int Bits>
void dot_codes(const unsigned char* page, const uint16_t* scales, int32_t dim, int32_t group, const float* x,
               float* dots) {
    constexpr int kLineDims = 4 * (8 / Bits);
    V sum = zero(), scale = zero();
    for (int d = 0, left = 0; d < dim; d += kLineDims, left -= kLineDims, page += 64) {
        if (left == 0) scale = load_bf16(scales), scales += kSlots, left = group;
        Sums sums;
        clear(sums);
        each_code<Bits, 0>(load_line(page), [&](int i, V code) __attribute__((always_inline)) {
            sums.x[i % kSums] = fma(code, set1(x[d + i]), sums.x[i % kSums]);
        });
        sum = fma(scale, total(sums), sum);
    }
    store(dots, sum);
}

void sum_keys(const float* k, const float* weight, uint16_t slots, int32_t dim, float* sums) {
    const V w = load(weight);
    for (int d = 0; d < dim; ++d) {
        const V old = load(sums + d * kSlots), now = fma(load(k + d * kSlots), w, old);
        store(sums + d * kSlots, slots == kAllSlots ? now : blend(slots, now, old));
    }
}

void fold_keys(const float* sums, int32_t dim, float* out) {
    float turned[kSlots][16];
    const void* from[16];
    for (int d = 0; d < dim; d += 16) {
        for (int i = 0; i < 16; ++i) from[i] = sums + (d + i) * kSlots;
        transpose(from, 0, turned);
        V sum = load(turned[0]);
        for (int slot = 1; slot < kSlots; ++slot) sum = add(sum, load(turned[slot]));
        store(out + d, sum);
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
    table->dot_keys[0] = dot_full<Format::f32>;
    table->dot_keys[1] = dot_full<Format::bf16>;
    table->dot_keys[2] = dot_full<Format::f16>;
    table->dot_keys[3] = dot_codes<8>;
    table->dot_keys[4] = dot_codes<4>;
    table->dot_keys[5] = dot_codes<2>;
    table->sum_keys = sum_keys;
    table->fold_keys = fold_keys;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_keys(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
