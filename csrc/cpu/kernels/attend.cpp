// attend, a block of full pages at a time: QK, online softmax, PV, all in f32.
//
// Rows share loads, never an accumulator, and the order of additions is the same whether a row is computed alone, in a
// register tile, or from a page decoded for many rows. Which pages make a block depends on all queries of a KV row.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "common/layout.h"
#include "cpu/kernels/softmax.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr int kDecodeRows = 12;  // from this many query rows on, a 16-bit page is decoded once for all

// A pair of operands: two K dims of all slots, or sixteen dims of two V slots. 16-bit formats hold both in one line,
// f32 in two lines `stride` bytes apart.
template <Format F>
KV_INLINE void load_pair(const unsigned char* first, int64_t stride, V& even, V& odd) {
    if constexpr (F == Format::f32) {
        even = load(reinterpret_cast<const float*>(first));
        odd = load(reinterpret_cast<const float*>(first + stride));
    } else if constexpr (F == Format::bf16) {
        pairs_bf16(first, even, odd);
    } else {
        pairs_f16(first, even, odd);
    }
}

// z[n, slot] = q[n] . k[slot] for N rows, kBlock pages apart. Lanes are slots, so a hidden slot's garbage stays in its lane.
template <Format F, int N>
KV_INLINE void qk(const float* q, int stride, const unsigned char* k, int dim, float* z, Ahead* ahead) {
    constexpr int kBytes = F == Format::f32 ? 128 : 64;  // of one pair of dims
    constexpr int kPairs = kChains / 2;
    V sum[N][kChains], a, b;
    for (int n = 0; n < N; ++n) {
        for (int c = 0; c < kChains; ++c) sum[n][c] = zero();
    }
    int d = 0;
    for (; d + kChains <= dim; d += kChains) {
        for (int c = 0; c < kPairs; ++c) {
            const int64_t at = static_cast<int64_t>(d / 2 + c) * kBytes;
            load_pair<F>(k + at, 64, a, b);
            if (ahead && c % 2 == 0) ahead->fetch(F == Format::f32 ? 2 : 1);
            for (int n = 0; n < N; ++n) {
                sum[n][2 * c] = fma(set1(q[n * stride + d + 2 * c]), a, sum[n][2 * c]);
                sum[n][2 * c + 1] = fma(set1(q[n * stride + d + 2 * c + 1]), b, sum[n][2 * c + 1]);
            }
        }
    }
    for (; d < dim; d += 2) {  // where dim is odd, the other half of the last pair is padding: it must not enter
        load_pair<F>(k + static_cast<int64_t>(d / 2) * kBytes, 64, a, b);
        for (int n = 0; n < N; ++n) {
            sum[n][0] = fma(set1(q[n * stride + d]), a, sum[n][0]);
            if (d + 1 < dim) sum[n][1] = fma(set1(q[n * stride + d + 1]), b, sum[n][1]);
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int c = kChains / 2; c > 0; c /= 2) {
            for (int i = 0; i < c; ++i) sum[n][i] = add(sum[n][i], sum[n][i + c]);
        }
        store(z + n * kBlock * kSlots, sum[n][0]);
    }
}

// sum[n] += p[n, slot] * v[slot] over a page's slots, for N rows that read the same ones, in W groups of sixteen dims.
// Partial: `mask` zeroes the values of slots they may not read before any product: 0 * NaN is NaN.
template <Format F, int N, int W, bool Partial>
KV_INLINE void pv_page(V (&sum)[N][W], const AttendTile& t, const float* p, const unsigned char* line, uint16_t mask,
                       Ahead* ahead) {
    const int64_t pair = static_cast<int64_t>(t.stride) * (F == Format::f32 ? 8 : 4);  // bytes of two slots
    V odd[N][W], a, b;
    for (int n = 0; n < N; ++n) {
        for (int w = 0; w < W; ++w) odd[n][w] = zero();
    }
    for (int u = 0; u < kSlots / 2; ++u, line += pair, p += 2, mask >>= 2) {
        if (ahead) ahead->fetch(3 * W / 2);
        for (int w = 0; w < W; ++w) {
            load_pair<F>(line + 64 * w, pair / 2, a, b);
            if constexpr (Partial) {
                a = bits_and(a, mask & 1 ? ~0u : 0u);
                b = bits_and(b, mask & 2 ? ~0u : 0u);
            }
            for (int n = 0; n < N; ++n) {
                sum[n][w] = fma(set1(p[n * kBlock * kSlots]), a, sum[n][w]);
                odd[n][w] = fma(set1(p[n * kBlock * kSlots + 1]), b, odd[n][w]);
            }
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int w = 0; w < W; ++w) sum[n][w] = add(sum[n][w], odd[n][w]);
    }
}

// acc[n] = acc[n] * rescale[n] + p . v of pages [first, last) of the block, for N rows that read the same slots, in W groups
// of sixteen dims from d on; v[j] are the values of page j.
template <Format F, int N, int W>
KV_INLINE void pv(const AttendTile& t, const unsigned char* const* v, int first, int last, int row, int d,
                  Ahead* ahead) {
    V sum[N][W];
    for (int n = 0; n < N; ++n) {
        for (int w = 0; w < W; ++w) {
            sum[n][w] = mul(load(t.acc + (row + n) * t.stride + d + 16 * w), set1(t.rescale[row + n]));
        }
    }
    for (int j = first; j < last; ++j) {
        const uint16_t mask = mask_of(t, row, j);
        const float* const p = t.p + lanes_at(row, j);
        if (mask == kAllSlots) {
            pv_page<F, N, W, false>(sum, t, p, v[j] + d * 4, mask, ahead);
        } else if (mask) {
            pv_page<F, N, W, true>(sum, t, p, v[j] + d * 4, mask, ahead);
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int w = 0; w < W; ++w) store(t.acc + (row + n) * t.stride + d + 16 * w, sum[n][w]);
    }
}

template <Format F>
void all_qk(const AttendTile& t, int page, const unsigned char* k, Ahead* ahead) {
    for (int row = 0; row < t.rows; row += kTile, ahead = nullptr) {
        with_rows(t.rows - row < kTile ? t.rows - row : kTile, [&](auto rows) {
            qk<F, rows.n>(t.q + row * t.stride, t.stride, k, t.head_dim, t.z + lanes_at(row, page), ahead);
        });
    }
}

// Rows that read the same slots share a register tile; on a causal edge each goes alone.
template <Format F>
void all_pv(const AttendTile& t, const PageBlock& b, const unsigned char* const* v, int first, int last, Ahead* ahead) {
    for (int row = 0, n = 1; row < t.rows; row += n) {
        n = 1;
        if (!t.live[row]) continue;
        n = rows_alike(t, b, row);
        with_rows(n, [&](auto rows) {
            int d = 0;
            for (; d + 16 * kWide <= t.stride; d += 16 * kWide) {
                pv<F, rows.n, kWide>(t, v, first, last, row, d, ahead);
            }
            for (; d < t.stride; d += 16) pv<F, rows.n, 1>(t, v, first, last, row, d, ahead);
        });
        ahead = nullptr;
    }
}

// K of a 16-bit page as f32 [D][16], or V as [16][stride].
template <Format F>
void decode_k(const AttendTile& t, const unsigned char* k) {
    V a, b;
    for (int p = 0; p < t.stride / 2; ++p) {
        load_pair<F>(k + p * 64, 0, a, b);
        store(t.decoded + p * 32, a);
        store(t.decoded + p * 32 + 16, b);
    }
}
template <Format F>
void decode_v(const AttendTile& t, const unsigned char* v) {
    V a, b;
    for (int u = 0; u < kSlots / 2; ++u) {
        for (int d = 0; d < t.stride; d += 16) {
            load_pair<F>(v + (static_cast<int64_t>(u) * t.stride + d) * 4, 0, a, b);
            store(t.decoded + (2 * u) * t.stride + d, a);
            store(t.decoded + (2 * u + 1) * t.stride + d, b);
        }
    }
}

template <Format F>
int64_t half_page(const AttendTile& t) {
    return static_cast<int64_t>(kSlots) * t.stride * (F == Format::f32 ? 4 : 2);
}

// As below, for so many rows that each page is decoded once for all.
template <Format F>
void attend_decoded(const AttendTile& t, const PageBlock& b) {
    const int64_t half = half_page<F>(t);
    Ahead ahead{b.ahead, 2 * half};
    const unsigned char* const decoded = reinterpret_cast<const unsigned char*>(t.decoded);
    for (int j = 0; j < b.count; ++j) {
        ahead.fetch(static_cast<int>(half / 64));
        decode_k<F>(t, b.pages[j]);
        all_qk<Format::f32>(t, j, decoded, nullptr);
    }
    soften_all(t, b, t.acc_rotated);
    for (int row = 0; row < t.rows; ++row) {
        rescale_row(t.acc, row, t.stride, t.rescale[row]);
        t.rescale[row] = 1.0f;
    }
    const unsigned char* values[kBlock];
    for (int j = 0; j < b.count; ++j) {
        ahead.fetch(static_cast<int>(half / 64));
        decode_v<F>(t, b.pages[j] + half);
        values[j] = decoded;
        all_pv<Format::f32>(t, b, values, j, j + 1, nullptr);
    }
}

template <Format F>
void attend_block(const AttendTile& t, const PageBlock& b) {
    if (F != Format::f32 && t.rows >= kDecodeRows) return attend_decoded<F>(t, b);
    const int64_t half = half_page<F>(t);
    Ahead ahead{b.ahead, 2 * half};
    const unsigned char* values[kBlock];
    for (int j = 0; j < b.count; ++j) {
        values[j] = b.pages[j] + half;
        all_qk<F>(t, j, b.pages[j], &ahead);
    }
    soften_all(t, b, t.acc_rotated);
    all_pv<F>(t, b, values, 0, b.count, &ahead);
}

}  // namespace

void fill_attend(Kernels* table) {
    table->attend_block[0] = attend_block<Format::f32>;
    table->attend_block[1] = attend_block<Format::bf16>;
    table->attend_block[2] = attend_block<Format::f16>;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_attend(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
