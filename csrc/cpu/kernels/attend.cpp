// attend, one full page at a time: QK, online softmax, PV, all in f32.
//
// The bits of a query row depend on its own data only: rows share loads, never an accumulator, and the order of
// additions is the same whether a row is computed alone, in a register tile, or from a page decoded for many rows.
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

// z[n, slot] = q[n] . k[slot] for N rows. Lanes are slots, so a hidden slot's garbage stays in its own lane.
template <Format F, int N>
KV_INLINE void qk(const float* q, int stride, const unsigned char* k, int dim, float* z, const unsigned char* ahead) {
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
            if (ahead) {
                prefetch(ahead + at);
                if constexpr (F == Format::f32) prefetch(ahead + at + 64);
            }
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
        store(z + n * kSlots, sum[n][0]);
    }
}

// acc[n] = acc[n] * rescale[n] + sum over slots of p[n, slot] * v[slot], for N rows that read the same slots, in W groups
// of sixteen dims from d on. `keep` zeroes the values of slots they may not read before any product: 0 * NaN is NaN.
template <Format F, int N, int W, bool Partial>
KV_INLINE void pv(const AttendTile& t, int row, int d, const unsigned char* v, const uint32_t* keep,
                  const unsigned char* ahead) {
    const int64_t pair = static_cast<int64_t>(t.stride) * (F == Format::f32 ? 8 : 4);  // bytes of two slots
    const float* p = t.p + row * kSlots;
    const unsigned char* line = v + d * 4;
    const unsigned char* next = ahead ? ahead + d * 4 : nullptr;
    V even[N][W], odd[N][W], a, b;
    for (int n = 0; n < N; ++n) {
        for (int w = 0; w < W; ++w) {
            even[n][w] = mul(load(t.acc + (row + n) * t.stride + d + 16 * w), set1(t.rescale[row + n]));
            odd[n][w] = zero();
        }
    }
    for (int u = 0; u < kSlots / 2; ++u, line += pair, p += 2) {
        if (next) {
            for (int w = 0; w < W; ++w) prefetch(next + 64 * w);
            if constexpr (F == Format::f32) {
                for (int w = 0; w < W; ++w) prefetch(next + pair / 2 + 64 * w);
            }
            next += pair;
        }
        for (int w = 0; w < W; ++w) {
            load_pair<F>(line + 64 * w, pair / 2, a, b);
            if constexpr (Partial) {
                a = bits_and(a, keep[2 * u]);
                b = bits_and(b, keep[2 * u + 1]);
            }
            for (int n = 0; n < N; ++n) {
                even[n][w] = fma(set1(p[n * kSlots]), a, even[n][w]);
                odd[n][w] = fma(set1(p[n * kSlots + 1]), b, odd[n][w]);
            }
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int w = 0; w < W; ++w) store(t.acc + (row + n) * t.stride + d + 16 * w, add(even[n][w], odd[n][w]));
    }
}

template <Format F, int N, bool Partial>
KV_INLINE void pv_rows(const AttendTile& t, int row, const unsigned char* v, const uint32_t* keep,
                       const unsigned char* ahead) {
    int d = 0;
    for (; d + 16 * kWide <= t.stride; d += 16 * kWide) pv<F, N, kWide, Partial>(t, row, d, v, keep, ahead);
    for (; d < t.stride; d += 16) pv<F, N, 1, Partial>(t, row, d, v, keep, ahead);
}

template <Format F>
void all_qk(const AttendTile& t, const unsigned char* k, const unsigned char* ahead) {
    for (int row = 0; row < t.rows; row += kTile, ahead = nullptr) {
        with_rows(t.rows - row < kTile ? t.rows - row : kTile, [&](auto rows) {
            qk<F, rows.n>(t.q + row * t.stride, t.stride, k, t.head_dim, t.z + row * kSlots, ahead);
        });
    }
}

// Rows that read the same slots share a register tile; on a causal edge each goes alone.
template <Format F>
void all_pv(const AttendTile& t, const unsigned char* v, const unsigned char* ahead) {
    uint32_t keep[kSlots];
    for (int row = 0, n = 1; row < t.rows; row += n) {
        const uint16_t mask = t.live[row];
        for (n = 1; n < kTile && row + n < t.rows && t.live[row + n] == mask;) ++n;
        if (!mask) continue;
        for (int i = 0; i < kSlots; ++i) keep[i] = mask >> i & 1 ? ~0u : 0u;
        with_rows(n, [&](auto rows) {
            if (mask == kAllSlots) {
                pv_rows<F, rows.n, false>(t, row, v, keep, ahead);
            } else {
                pv_rows<F, rows.n, true>(t, row, v, keep, ahead);
            }
        });
        ahead = nullptr;
    }
}

// K of a 16-bit page as f32 [D][16], and V as [16][stride].
template <Format F>
const unsigned char* decode_k(const AttendTile& t, const unsigned char* k) {
    V a, b;
    for (int p = 0; p < t.stride / 2; ++p) {
        load_pair<F>(k + p * 64, 0, a, b);
        store(t.decoded + p * 32, a);
        store(t.decoded + p * 32 + 16, b);
    }
    return reinterpret_cast<const unsigned char*>(t.decoded);
}
template <Format F>
const unsigned char* decode_v(const AttendTile& t, const unsigned char* v) {
    float* const v32 = t.decoded + kSlots * t.stride;
    V a, b;
    for (int u = 0; u < kSlots / 2; ++u) {
        for (int d = 0; d < t.stride; d += 16) {
            load_pair<F>(v + (static_cast<int64_t>(u) * t.stride + d) * 4, 0, a, b);
            store(v32 + (2 * u) * t.stride + d, a);
            store(v32 + (2 * u + 1) * t.stride + d, b);
        }
    }
    return reinterpret_cast<const unsigned char*>(v32);
}

template <Format F>
int64_t half_page(const AttendTile& t) {
    return static_cast<int64_t>(kSlots) * t.stride * (F == Format::f32 ? 4 : 2);
}
template <Format F>
bool decodes(const AttendTile& t) {
    return F != Format::f32 && t.rows >= kDecodeRows;
}
KV_INLINE void prefetch_all(const unsigned char* ahead, int64_t bytes) {
    for (int64_t i = 0; ahead && i < bytes; i += 64) prefetch(ahead + i);
}

template <Format F>
void attend_page(const AttendTile& t, const unsigned char* page, const unsigned char* ahead) {
    const int64_t half = half_page<F>(t);
    if (decodes<F>(t)) {
        prefetch_all(ahead, 2 * half);
        const unsigned char* const v32 = decode_v<F>(t, page + half);
        all_qk<Format::f32>(t, decode_k<F>(t, page), nullptr);
        soften_all(t, t.acc_rotated);
        all_pv<Format::f32>(t, v32, nullptr);
        return;
    }
    all_qk<F>(t, page, ahead);
    soften_all(t, t.acc_rotated);
    all_pv<F>(t, page + half, ahead ? ahead + half : nullptr);
}

template <Format F>
void logits_page(const AttendTile& t, const unsigned char* page, const unsigned char* ahead) {
    if (decodes<F>(t)) {
        prefetch_all(ahead, half_page<F>(t));
        all_qk<Format::f32>(t, decode_k<F>(t, page), nullptr);
    } else {
        all_qk<F>(t, page, ahead);
    }
    for (int row = 0; row < t.rows; ++row) finish_logits(t, row);
}

}  // namespace

void fill_attend(Kernels* table) {
    table->attend_page[0] = attend_page<Format::f32>;
    table->attend_page[1] = attend_page<Format::bf16>;
    table->attend_page[2] = attend_page<Format::f16>;
    table->logits_page[0] = logits_page<Format::f32>;
    table->logits_page[1] = logits_page<Format::bf16>;
    table->logits_page[2] = logits_page<Format::f16>;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_attend(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
