// Window queries over full pages, and the softmax of a block of them over the pages of a unit.
//
// A page's keys are widened once for all rows of the block; then each line of them is loaded once for a register tile.
// The bits of a row depend on its own data only: rows share loads, never an accumulator.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "cpu/kernels/window_tile.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

// Rows whose sums stay in registers beside the constants of exp; divides kWindowRows.
constexpr int kSoftRows = kWindowRows > 1 ? kWindowRows / 2 : 1;

// Keys of a page as f32 [D][16].
template <Format F>
KV_INLINE const float* widen(const WindowTile& t, const unsigned char* page) {
    if constexpr (F == Format::f32) return reinterpret_cast<const float*>(page);
    float* const k = reinterpret_cast<float*>(t.decoded);
    V first, second;
    for (int d = 0; d < t.head_dim; d += 2) {  // where D is odd, its padding follows: there is room for it
        if constexpr (F == Format::bf16) {
            pairs_bf16(page + d * 32, first, second);
        } else {
            pairs_f16(page + d * 32, first, second);
        }
        store(k + d * kSlots, first);
        store(k + (d + 1) * kSlots, second);
    }
    return k;
}

template <Format F>
void window_page(const WindowTile& t, const unsigned char* page, const unsigned char* ahead) {
    const float* const k = widen<F>(t, page);
    const int64_t bytes = static_cast<int64_t>(t.head_dim) * kSlots * (F == Format::f32 ? 4 : 2);
    const float* q = reinterpret_cast<const float*>(t.q);
    for (int row = 0; row < t.rows; row += kWindowRows) {
        V dots[kWindowRows];
        for (V& x : dots) x = zero();
        prefetch_share(t, row, ahead, bytes);
        for (int d = 0; d < t.head_dim; ++d, q += kWindowRows) {
            const V line = load(k + d * kSlots);
            for (int n = 0; n < kWindowRows; ++n) dots[n] = fma(set1(q[n]), line, dots[n]);
        }
        finish_tile(t, row, dots);
    }
}

KV_INLINE float sum_lanes(V x) {
    float lanes[16], total = 0.0f;
    store(lanes, x);
    for (float lane : lanes) total += lane;
    return total;
}

template <bool Moved>
KV_INLINE void soften_rows(float* z, int32_t entries, int64_t stride, const float* lanes, float* m, float* total,
                           float* moved) {
    V sum[kSoftRows], products[kSoftRows];
    for (int n = 0; n < kSoftRows; ++n) {
        const float most = max_lane(load(lanes + n * kSlots));
        m[n] = most == kUnread ? 0.0f : most;
        sum[n] = products[n] = zero();
    }
    for (int e = 0; e < entries; ++e, z += stride) {
        for (int n = 0; n < kSoftRows; ++n) {
            const V x = sub(load(z + n * kSlots), set1(m[n])), y = exp(x);
            store(z + n * kSlots, y);
            sum[n] = add(sum[n], y);
            // -100: y is 0 from there on, and 0 times -inf would not be.
            if constexpr (Moved) products[n] = fma(y, max(set1(-100.0f), x), products[n]);
        }
    }
    for (int n = 0; n < kSoftRows; ++n) {
        total[n] = sum_lanes(sum[n]);
        if constexpr (Moved) moved[n] = sum_lanes(products[n]);
    }
}

void soften_window(float* z, int32_t entries, int32_t rows, const float* lanes, float* m, float* total, float* moved) {
    const int64_t stride = static_cast<int64_t>(rows) * kSlots;
    for (int row = 0; row < rows; row += kSoftRows) {
        if (moved) {
            soften_rows<true>(z + row * kSlots, entries, stride, lanes + row * kSlots, m + row, total + row,
                              moved + row);
        } else {
            soften_rows<false>(z + row * kSlots, entries, stride, lanes + row * kSlots, m + row, total + row, nullptr);
        }
    }
}

}  // namespace

void fill_window(Kernels* table) {
    table->window_rows = kWindowRows;
    table->window_page[0] = window_page<Format::f32>;
    table->window_page[1] = window_page<Format::bf16>;
    table->window_page[2] = window_page<Format::f16>;
    table->soften_window = soften_window;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_window(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
