// Sums over the values of a page, whatever its format, and over value means.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "common/layout.h"
#include "cpu/kernels/dot.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

KV_INLINE void add_to(float* sums, V x) { store(sums, add(load(sums), x)); }

void sum_f32(const unsigned char* v, const uint16_t*, int32_t dim, int32_t, uint16_t slots, float* sums) {
    for (; slots; slots &= static_cast<uint16_t>(slots - 1)) {
        const float* const x = reinterpret_cast<const float*>(v) + __builtin_ctz(slots) * dim;
        for (int d = 0; d < dim; d += 16) add_to(sums + d, load(x + d));
    }
}

template <Format F>
void sum_pairs(const unsigned char* v, const uint16_t*, int32_t dim, int32_t, uint16_t slots, float* sums) {
    for (int pair = 0; pair < kSlots / 2; ++pair, slots >>= 2) {
        for (int d = 0; (slots & 3) && d < dim; d += 16) {
            V first, second;
            if constexpr (F == Format::bf16) {
                pairs_bf16(v + (pair * dim + d) * 4, first, second);
            } else {
                pairs_f16(v + (pair * dim + d) * 4, first, second);
            }
            if (slots & 1) add_to(sums + d, first);
            if (slots & 2) add_to(sums + d, second);
        }
    }
}

template <int Bits>
void sum_codes(const unsigned char* v, const uint16_t* scales, int32_t dim, int32_t group, uint16_t slots,
               float* sums) {
    constexpr int kRun = 4 * (8 / Bits);  // slots to a line
    for (int d = 0; d < dim; d += 16) {
        float scale[kSlots];
        store(scale, load_bf16(scales + d / group * kSlots));
        V sum = load(sums + d);
        for (int first = 0; first < kSlots; first += kRun) {
            const I line = load_line(v + (first / kRun * dim + d) * 4);
            each_code<Bits, 0>(line, [&](int i, V code) __attribute__((always_inline)) {
                if (slots >> (first + i) & 1) sum = fma(set1(scale[first + i]), code, sum);
            });
        }
        store(sums + d, sum);
    }
}

constexpr int kHeads = 4;  // query heads that visit the value means together

template <int Heads, int Wide>
KV_INLINE void add_dims(const unsigned char* codes, const unsigned char* ahead, uint32_t lanes, const float* weight,
                        int64_t stride, int32_t dim, float* acc) {
    V sums[Heads][Wide];
    for (int g = 0; g < Heads; ++g) {
        for (int w = 0; w < Wide; ++w) sums[g][w] = load(acc + g * dim + w * 16);
    }
    for (int i = 0; lanes; lanes &= lanes - 1, ++i) {
        const int at = __builtin_ctz(lanes) * dim;
        prefetch(ahead + at);
        for (int w = 0; w < Wide; ++w) {
            const V x = load_code(codes + at + w * 16);
            for (int g = 0; g < Heads; ++g) sums[g][w] = fma(set1(weight[g * stride + i]), x, sums[g][w]);
        }
    }
    for (int g = 0; g < Heads; ++g) {
        for (int w = 0; w < Wide; ++w) store(acc + g * dim + w * 16, sums[g][w]);
    }
}

template <int Heads>
KV_INLINE void add_heads(const unsigned char* codes, const unsigned char* ahead, uint16_t lanes, const float* weight,
                         int64_t stride, int32_t dim, float* acc) {
    int d = 0;
    for (; d + 32 <= dim; d += 32) add_dims<Heads, 2>(codes + d, ahead + d, lanes, weight, stride, dim, acc + d);
    if (d < dim) add_dims<Heads, 1>(codes + d, ahead + d, lanes, weight, stride, dim, acc + d);
}

void add_values(const unsigned char* codes, const unsigned char* ahead, uint16_t lanes, const float* weight,
                int64_t stride, int32_t rows, int32_t dim, float* acc) {
    int g = 0;
    for (; g + kHeads <= rows; g += kHeads) {
        add_heads<kHeads>(codes, ahead, lanes, weight + g * stride, stride, dim, acc + g * dim);
    }
    for (; g < rows; ++g) add_heads<1>(codes, ahead, lanes, weight + g * stride, stride, dim, acc + g * dim);
}

}  // namespace

void fill_values(Kernels* table) {
    table->add_values = add_values;
    table->sum_values[0] = sum_f32;
    table->sum_values[1] = sum_pairs<Format::bf16>;
    table->sum_values[2] = sum_pairs<Format::f16>;
    table->sum_values[3] = sum_codes<8>;
    table->sum_values[4] = sum_codes<4>;
    table->sum_values[5] = sum_codes<2>;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_values(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
