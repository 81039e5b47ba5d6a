// attend over bf16 pages with bf16 products: two dims or two slots at a time, sums in f32.
//
// q and p are two bf16 terms each, x = high + low to 16 bits of x, so products lose nothing that matters; a q that is bf16
// already has no second term. Denormal numbers count as 0; an infinite value in V gives NaN, for it meets the second term of p.
#include "cpu/kernels/level.h"
#if defined(KV_ISA_avx512_bf16)
#include "cpu/kernels/pairs.h"
#include "cpu/kernels/softmax.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr int kSums = 4;  // independent sums of a row in QK

KV_INLINE V dot(V sum, __m512i line, uint32_t pair) {
    const __m512i both = _mm512_set1_epi32(static_cast<int>(pair));
    return {_mm512_dpbf16_ps(sum.x, reinterpret_cast<__m512bh>(line), reinterpret_cast<__m512bh>(both))};
}

// Rows of a register tile as pairs of bf16.
template <int N>
struct Queries {
    uint32_t high[N][kMaxHeadDim / 2], low[N][kMaxHeadDim / 2];
    bool exact[N], all_exact;  // low is 0: then it must not meet an infinite key
};
template <int N>
KV_INLINE void load_queries(Queries<N>& q, const AttendTile& t, int row) {
    q.all_exact = true;
    for (int n = 0; n < N; ++n) {
        uint16_t other = 0;                       // lanes that are more than their first term; an infinite one is not
        for (int d = 0; d < t.stride; d += 16) {  // padding is 0
            const V x = load(t.q + (row + n) * t.stride + d);
            split(x, q.high[n] + d / 2, q.low[n] + d / 2);
            other |= differ(x, load_bf16(q.high[n] + d / 2));
        }
        q.exact[n] = !other;
        q.all_exact &= q.exact[n];
    }
}

template <int N, bool Exact>
KV_INLINE void qk(const AttendTile& t, const Queries<N>& q, int row, int page, const unsigned char* k, Ahead* ahead) {
    V sum[N][kSums];
    for (int n = 0; n < N; ++n) {
        for (V& x : sum[n]) x = zero();
    }
    const int words = t.head_dim / 2;
    const auto step = [&](__m512i line, int i, int c) __attribute__((always_inline)) {
        for (int n = 0; n < N; ++n) {
            sum[n][c] = dot(sum[n][c], line, q.high[n][i]);
            if constexpr (!Exact) {
                if (!q.exact[n]) sum[n][c] = dot(sum[n][c], line, q.low[n][i]);
            }
        }
    };
    int i = 0;
    for (; i + kSums <= words; i += kSums) {
        if (ahead) ahead->fetch(kSums / 2);
        for (int c = 0; c < kSums; ++c) step(_mm512_loadu_si512(k + 64 * (i + c)), i + c, c);
    }
    for (; i < words; ++i) step(_mm512_loadu_si512(k + 64 * i), i, 0);
    if (t.head_dim % 2) {  // the other half of the last pair is padding: it must not enter
        step(_mm512_and_si512(_mm512_loadu_si512(k + 64 * i), _mm512_set1_epi32(0xFFFF)), i, 0);
    }
    for (int n = 0; n < N; ++n) {
        store(t.z + lanes_at(row + n, page), add(add(sum[n][0], sum[n][2]), add(sum[n][1], sum[n][3])));
    }
}

template <int N>
KV_INLINE void qk_block(const AttendTile& t, const PageBlock& b, int row, Ahead* ahead) {
    Queries<N> q;
    load_queries(q, t, row);
    for (int j = 0; j < b.count; ++j) {
        if (q.all_exact) {
            qk<N, true>(t, q, row, j, b.pages[j], ahead);
        } else {
            qk<N, false>(t, q, row, j, b.pages[j], ahead);
        }
    }
}

// p of N rows as pairs of slots: two terms.
template <int N>
struct Shares {
    uint32_t high[kBlock][N][kSlots / 2], low[kBlock][N][kSlots / 2];
};

template <int N, int W, bool Partial>
KV_INLINE void pv_page(V (&sum)[N][W][2], const Shares<N>& p, int page, const unsigned char* line, int64_t pair,
                       uint16_t mask, Ahead* ahead) {
    for (int u = 0; u < kSlots / 2; ++u, line += pair, mask >>= 2) {
        if (ahead) ahead->fetch(3 * W / 2);
        for (int w = 0; w < W; ++w) {
            __m512i v = _mm512_loadu_si512(line + 64 * w);
            if constexpr (Partial) {  // before any product: 0 * NaN is NaN
                const uint32_t keep = (mask & 1 ? 0x0000FFFFu : 0u) | (mask & 2 ? 0xFFFF0000u : 0u);
                v = _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(keep)));
            }
            for (int n = 0; n < N; ++n) {
                sum[n][w][0] = dot(sum[n][w][0], v, p.high[page][n][u]);
                sum[n][w][1] = dot(sum[n][w][1], v, p.low[page][n][u]);
            }
        }
    }
}

// acc[n] = acc[n] * rescale[n] + p . v of the block, in W groups of sixteen dims from d on.
template <int N, int W>
KV_INLINE void pv(const AttendTile& t, const PageBlock& b, const Shares<N>& p, int row, int d, Ahead* ahead) {
    const int64_t half = static_cast<int64_t>(kSlots) * t.stride * 2, pair = static_cast<int64_t>(t.stride) * 4;
    V sum[N][W][2];
    for (int n = 0; n < N; ++n) {
        for (int w = 0; w < W; ++w) {
            const float* const acc = t.acc + (row + n) * t.stride + d + 16 * w;
            sum[n][w][0] = mul(load(acc), set1(t.rescale[row + n]));
            sum[n][w][1] = zero();
        }
    }
    for (int j = 0; j < b.count; ++j) {
        const uint16_t mask = mask_of(t, row, j);
        const unsigned char* const line = b.pages[j] + half + static_cast<int64_t>(d) * 4;
        if (mask == kAllSlots) {
            pv_page<N, W, false>(sum, p, j, line, pair, mask, ahead);
        } else if (mask) {
            pv_page<N, W, true>(sum, p, j, line, pair, mask, ahead);
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int w = 0; w < W; ++w) {
            store(t.acc + (row + n) * t.stride + d + 16 * w, add(sum[n][w][0], sum[n][w][1]));
        }
    }
}

template <int N>
KV_INLINE void pv_rows(const AttendTile& t, const PageBlock& b, int row, Ahead* ahead) {
    Shares<N> p;
    for (int j = 0; j < b.count; ++j) {
        for (int n = 0; n < N; ++n) split(load(t.p + lanes_at(row + n, j)), p.high[j][n], p.low[j][n]);
    }
    int d = 0;
    for (; d + 16 * kWide <= t.stride; d += 16 * kWide) pv<N, kWide>(t, b, p, row, d, ahead);
    for (; d < t.stride; d += 16) pv<N, 1>(t, b, p, row, d, ahead);
}

void attend_block(const AttendTile& t, const PageBlock& b) {
    Ahead lines{b.ahead, static_cast<int64_t>(kSlots) * t.stride * 4};
    Ahead* ahead = &lines;
    for (int row = 0; row < t.rows; row += kTile, ahead = nullptr) {
        with_rows(t.rows - row < kTile ? t.rows - row : kTile, [&](auto rows) { qk_block<rows.n>(t, b, row, ahead); });
    }
    soften_all(t, b, t.acc_rotated);
    ahead = &lines;
    for (int row = 0, n = 1; row < t.rows; row += n) {
        n = 1;
        if (!t.live[row]) continue;
        n = rows_alike(t, b, row);
        with_rows(n, [&](auto rows) { pv_rows<rows.n>(t, b, row, ahead); });
        ahead = nullptr;
    }
}

}  // namespace

void fill_attend_pairs(Kernels* table) { table->attend_block[1] = attend_block; }

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_attend_pairs(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
