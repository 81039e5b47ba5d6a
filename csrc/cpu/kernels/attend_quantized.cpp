// attend, a block of quantized pages at a time, in the rotated domain and in whole numbers.
//
// QK: R q = delta * n with n of 16 bits, so n . c of a group is an exact sum: the same bits at every level.
// PV: p * s of a block's slots = sigma * n likewise, one sigma per row, block and group of dims. Codes are expanded to 16
// bits in registers; codes of hidden slots are whole numbers like any other, so only their scales and logits are masked.
#include "cpu/kernels/level.h"
#if KV_DOT_KERNELS
#include "cpu/kernels/dot.h"
#include "cpu/kernels/shares.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr uint16_t kAllLanes = 0xFFFF;

// sum[i][n] += the codes of line i . the numbers of row n, for the fields from K on. `numbers` are those of the first quad of
// all M lines: a pair of them is spread over a register once for M dots, as loads are what bounds them.
template <int Bits, int K, int M, int N>
KV_INLINE void dot_fields(I (&sum)[M][N], const I (&line)[M], const int16_t* numbers, int stride) {
    constexpr int kFields = 16 / Bits, kQuads = 8 / Bits;
    if constexpr (K < kFields) {
        I codes[M];
        for (int i = 0; i < M; ++i) codes[i] = field<Bits, K>(line[i]);
        const int16_t* const pair = numbers + 4 * (K % kQuads) + 2 * (K / kQuads);
        for (int n = 0; n < N; ++n) {
            const Pair both = spread(pair + n * stride);
            for (int i = 0; i < M; ++i) sum[i][n] = dot(sum[i][n], codes[i], both);
        }
        dot_fields<Bits, K + 1>(sum, line, numbers, stride);
    }
}
template <int M, int N>
KV_INLINE void clear(I (&sum)[M][N]) {
    for (int i = 0; i < M; ++i) {
        for (int n = 0; n < N; ++n) sum[i][n] = none();
    }
}

// z[n, page, slot] = q[n] . k[slot] for N rows from `row` on, of M pages from `page` on: delta * (sum over groups of
// scale * n . c) + q . centre. scales: bytes from a page to those of its keys.
template <Format F, int N, int M>
KV_INLINE void qk(const AttendTile& t, const PageBlock& b, int row, int page, int64_t scales, Ahead* ahead) {
    constexpr int kLineDims = 4 * kShare<F>;
    const int group = t.group;
    const int16_t* numbers = t.query.codes + row * t.stride;
    V z[M][N];
    for (int i = 0; i < M; ++i) {
        for (int n = 0; n < N; ++n) z[i][n] = zero();
    }
    int64_t at = 0;
    for (int first = 0, g = 0; first < t.head_dim; first += group, ++g) {
        I sum[M][N];
        clear(sum);
        for (int d = 0; d < group; d += kLineDims, at += 64, numbers += kLineDims) {
            if (ahead) ahead->fetch(M);
            I line[M];
            for (int i = 0; i < M; ++i) line[i] = load_line(b.pages[page + i] + at);
            dot_fields<kBits<F>, 0>(sum, line, numbers, t.stride);
        }
        for (int i = 0; i < M; ++i) {
            const V scale = load_bf16(b.pages[page + i] + scales + g * kSlots * 2);
            for (int n = 0; n < N; ++n) z[i][n] = add(z[i][n], mul(scale, to_f32(sum[i][n])));
        }
    }
    for (int i = 0; i < M; ++i) {
        for (int n = 0; n < N; ++n) {
            const V whole_z = add(mul(z[i][n], set1(t.query.delta[row + n])), set1(t.query.centre[row + n]));
            store(t.z + lanes_at(row + n, page + i), whole_z);
        }
    }
}

// p * scale of N rows as numbers of 16 bits: sigma * n, for each group of dims.
template <int N>
struct Weights {
    int16_t n[kMaxGroups][kBlock][N][kSlots];
    float sigma[N][kMaxGroups];
};
template <int N>
KV_INLINE void find_weights(Weights<N>& w, const AttendTile& t, const PageBlock& b, int row, const Shares& shares,
                            int count) {
    for (int n = 0; n < N; ++n) {
        for (int g = 0; g < count; ++g) {
            V parts[kBlock];
            w.sigma[n][g] = weigh(parts, t, b, row + n, g, shares);
            for (int j = 0; j < b.count; ++j) store_quads(w.n[g][j][n], parts[j]);
        }
    }
}

// acc_rotated[n] = acc_rotated[n] * rescale[n] + sum over slots of p * R v, for N rows, in W groups of sixteen dims from d
// on, all of scale group g; v: bytes from a page to its values.
template <Format F, int N, int W>
KV_INLINE void pv(const AttendTile& t, const PageBlock& b, int row, int d, int g, const Weights<N>& w, int64_t v,
                  Ahead* ahead) {
    constexpr int kLines = 4 / kShare<F>;
    I sum[W][N];
    clear(sum);
    for (int j = 0; j < b.count; ++j) {
        for (int l = 0; l < kLines; ++l) {
            const int64_t at = (static_cast<int64_t>(l) * t.head_dim + d) * 4;
            if (ahead) ahead->fetch(W);
            I line[W];
            for (int i = 0; i < W; ++i) line[i] = load_line(b.pages[j] + v + at + 64 * i);
            dot_fields<kBits<F>, 0>(sum, line, w.n[g][j][0] + 4 * kShare<F> * l, kSlots);
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int i = 0; i < W; ++i) {
            float* const acc = t.acc_rotated + (row + n) * t.stride + d + 16 * i;
            const V whole_sum = to_f32(sum[i][n]);
            store(acc, fma(set1(w.sigma[n][g]), whole_sum, mul(load(acc), set1(t.rescale[row + n]))));
        }
    }
}

// The logits of M pages from `page` on.
template <Format F, int M>
void all_qk(const AttendTile& t, const PageBlock& b, int page, Ahead* ahead) {
    const int64_t scales = 2 * half_page<F>(t);
    for (int row = 0; row < t.rows; row += kTile, ahead = nullptr) {
        with_rows(t.rows - row < kTile ? t.rows - row : kTile,
                  [&](auto rows) { qk<F, rows.n, M>(t, b, row, page, scales, ahead); });
    }
}

template <Format F, int N>
KV_INLINE void pv_rows(const AttendTile& t, const PageBlock& b, int row, const Shares& shares, Ahead* ahead) {
    Weights<N> w;
    const int group = t.group;
    const int64_t v = half_page<F>(t);
    find_weights(w, t, b, row, shares, t.head_dim / group);
    for (int first = 0, g = 0; first < t.head_dim; first += group, ++g) {
        int d = first;
        for (; d + 16 * kPvWide <= first + group; d += 16 * kPvWide) {
            pv<F, N, kPvWide>(t, b, row, d, g, w, v, ahead);
        }
        for (; d < first + group; d += 16) pv<F, N, 1>(t, b, row, d, g, w, v, ahead);
    }
}

template <Format F>
void all_pv(const AttendTile& t, const PageBlock& b, Ahead* ahead) {
    bool any = false;
    for (int row = 0; row < t.rows; ++row) any |= t.live[row] != 0;
    if (!any) return;
    Shares shares;
    find_shares(shares, t, b, 2 * half_page<F>(t) + scale_bytes_of(t), t.head_dim / t.group);
    for (int row = 0, n = 1; row < t.rows; row += n) {  // rows that read nothing have no p
        n = 1;
        if (!t.live[row]) continue;
        while (n < kTile && row + n < t.rows && t.live[row + n]) ++n;
        with_rows(n, [&](auto rows) { pv_rows<F, rows.n>(t, b, row, shares, ahead); });
        ahead = nullptr;
    }
}

template <Format F>
void attend_block(const AttendTile& t, const PageBlock& b) {
    const int64_t scales = 2 * scale_bytes_of(t);
    Ahead ahead{b.ahead, 2 * half_page<F>(t) + scales};
    int page = 0;
    for (; page + kQkWide <= b.count; page += kQkWide) {
        ahead.fetch(static_cast<int>(kQkWide * scales / 64));
        all_qk<F, kQkWide>(t, b, page, &ahead);
    }
    for (; page < b.count; ++page) {
        ahead.fetch(static_cast<int>(scales / 64));
        all_qk<F, 1>(t, b, page, &ahead);
    }
    soften_all(t, b, t.acc);
    all_pv<F>(t, b, &ahead);
}

float encode_query(const float* rotated, int32_t dim, int16_t* codes) {
    V most = zero();
    uint16_t finite = kAllLanes;
    for (int d = 0; d < dim; d += 16) {
        const V x = magnitude(load(rotated + d));
        finite &= less(x, set1(__builtin_inff()));
        most = max(most, x);
    }
    const float largest = max_lane(most);
    const bool plain = finite == kAllLanes && largest >= kLeast;
    const V inverse = set1(plain ? kMost / largest : 0.0f);
    for (int d = 0; d < dim; d += 16) store_quads(codes + d, plain ? mul(load(rotated + d), inverse) : zero());
    if (finite != kAllLanes) return __builtin_nanf("");
    return plain ? largest / kMost : 0.0f;
}

float dot_product(const float* a, const float* b, int32_t n) {
    V sum = zero();
    for (int d = 0; d < n; d += 16) sum = add(sum, mul(load(a + d), load(b + d)));
    float lanes[16], total = 0.0f;
    store(lanes, sum);
    for (float lane : lanes) total += lane;
    return total;
}

}  // namespace

void fill_attend_quantized(Kernels* table) {
    table->attend_block[3] = attend_block<Format::int8>;
    table->attend_block[4] = attend_block<Format::int4>;
    table->attend_block[5] = attend_block<Format::int2>;
    table->encode_query = encode_query;
    table->dot_product = dot_product;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_attend_quantized(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
