// Window queries in bf16 over bf16 pages, two dims at a time: products are exact in f32, sums are rounded as elsewhere, but
// denormal numbers count as 0.
#include "cpu/kernels/level.h"
#if defined(KV_ISA_avx512_bf16)
#include "cpu/kernels/window_tile.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

void window_pairs(const WindowTile& t, const unsigned char* page, const unsigned char* ahead) {
    const int words = t.head_dim / 2;
    const uint32_t* q = t.q;
    for (int row = 0; row < t.rows; row += kWindowRows) {
        V dots[kWindowRows];
        for (V& x : dots) x = zero();
        prefetch_share(t, row, ahead, static_cast<int64_t>(words) * 64);
        for (int i = 0; i < words; ++i, q += kWindowRows) {
            const __m512i line = _mm512_loadu_si512(page + 64 * i);
            for (int n = 0; n < kWindowRows; ++n) {
                const __m512i pair = _mm512_set1_epi32(static_cast<int>(q[n]));
                dots[n].x =
                    _mm512_dpbf16_ps(dots[n].x, reinterpret_cast<__m512bh>(line), reinterpret_cast<__m512bh>(pair));
            }
        }
        finish_tile(t, row, dots);
    }
}

}  // namespace

void fill_window_pairs(Kernels* table) { table->window_pairs = window_pairs; }

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_window_pairs(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
