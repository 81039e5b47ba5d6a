// Window queries over quantized pages: attend's whole-number dot products (attend_quantized.cpp), bit for bit, but each
// code is expanded once for all rows of the block.
#include "cpu/kernels/level.h"
#if KV_DOT_KERNELS
#include "cpu/kernels/dot.h"
#include "cpu/kernels/window_tile.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

// The fields of a line from K on, each to its place among lines of pairs in the order of the queries' numbers.
template <int Bits, int K>
KV_INLINE void expand_fields(I line, unsigned char* to) {
    constexpr int kFields = 16 / Bits, kQuads = 8 / Bits;
    if constexpr (K < kFields) {
        store_line(to + 64 * (2 * (K % kQuads) + K / kQuads), field<Bits, K>(line));
        expand_fields<Bits, K + 1>(line, to);
    }
}

template <Format F>
void window_page(const WindowTile& t, const unsigned char* page, const unsigned char* ahead) {
    constexpr int kBits = format_bits(F), kFields = 16 / kBits;
    const int64_t half = static_cast<int64_t>(t.head_dim) * kSlots * kBits / 8;
    const int groups = t.head_dim / t.group, words = t.group / 2;
    const unsigned char* const scales = page + 2 * half;
    for (int64_t at = 0, i = 0; at < half; at += 64, i += kFields) {
        expand_fields<kBits, 0>(load_line(page + at), t.decoded + 64 * i);
    }
    const int16_t* q = reinterpret_cast<const int16_t*>(t.q);
    for (int row = 0; row < t.rows; row += kWindowRows) {
        const unsigned char* line = t.decoded;
        V z[kWindowRows];
        for (V& x : z) x = zero();
        prefetch_share(t, row, ahead, half);
        prefetch_share(t, row, ahead ? ahead + 2 * half : nullptr, static_cast<int64_t>(groups) * 2 * kSlots);
        for (int g = 0; g < groups; ++g) {
            I sum[kWindowRows];
            for (I& x : sum) x = none();
            for (int i = 0; i < words; ++i, line += 64, q += 2 * kWindowRows) {
                const I codes = load_line(line);
                for (int n = 0; n < kWindowRows; ++n) sum[n] = dot(sum[n], codes, spread(q + 2 * n));
            }
            const V scale = load_bf16(scales + g * kSlots * 2);
            for (int n = 0; n < kWindowRows; ++n) z[n] = add(z[n], mul(scale, to_f32(sum[n])));
        }
        for (int n = 0; n < kWindowRows; ++n) {
            z[n] = add(mul(z[n], set1(t.delta[row + n])), set1(t.centre[row + n]));
        }
        finish_tile(t, row, z);
    }
}

}  // namespace

void fill_window_quantized(Kernels* table) {
    table->window_page[3] = window_page<Format::int8>;
    table->window_page[4] = window_page<Format::int4>;
    table->window_page[5] = window_page<Format::int2>;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_window_quantized(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
