// Sixteen page summaries against query heads, and the reductions over pages that a selection needs.
#include "cpu/kernels/level.h"
#if KV_DOT_KERNELS
#include "common/layout.h"
#include "cpu/kernels/add_means.h"
#include "cpu/kernels/page_score.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr int kHeads = 4;  // query heads that visit a block together
constexpr float kMinusInf = -__builtin_inff();

template <int Heads, bool Capped>
KV_INLINE uint16_t score_heads(const PageQuery& q, int first, const unsigned char* block, const unsigned char* ahead,
                               const float* log_count, float* x, int64_t stride, float* most) {
    I even[Heads], odd[Heads];
    for (int g = 0; g < Heads; ++g) even[g] = odd[g] = none();
#pragma GCC unroll 2
    for (int d = 0; d < q.dim; d += 8) {  // dim is a multiple of 16
        prefetch(ahead + d * kSlots);
        prefetch(ahead + (d + 4) * kSlots);
        const I line = load_line(block + d * kSlots), next = load_line(block + (d + 4) * kSlots);
        for (int g = 0; g < Heads; ++g) {
            const int64_t at = static_cast<int64_t>(first + g) * q.dim + d;
            even[g] = add_means(even[g], line, q.codes + at, q.pairs + at);
            odd[g] = add_means(odd[g], next, q.codes + at + 4, q.pairs + at + 4);
        }
    }
    const float* const scale = reinterpret_cast<const float*>(block + static_cast<int64_t>(kSlots) * q.dim);
    const V count = load(log_count);
    const uint16_t there = differ(count, set1(kMinusInf));
    uint16_t bad = 0;
#pragma GCC unroll 4
    for (int g = 0; g < Heads; ++g) {
        const V shift = set1(static_cast<float>(q.shift[first + g]));  // below 2^24: exact
        const V dot = mul(sub(to_f32(add(even[g], odd[g])), shift), load(scale));
        const V curved = fma(set1(q.curvature[first + g]), load(scale + kSlots), count);
        bad |= put_score(first + g, score_of<Capped>(q, first + g, dot, curved), there, x + (first + g) * stride, most);
    }
    return bad;
}

template <bool Capped>
KV_INLINE uint16_t score_all(const PageQuery& q, const unsigned char* block, const unsigned char* ahead,
                             const float* log_count, float* x, int64_t stride, float* most) {
    for (int line = 0; line < 3; ++line) prefetch(ahead + (q.dim + 4 * line) * kSlots);  // what follows the means
    int g = 0;
    uint16_t bad = 0;
    for (; g + kHeads <= q.rows; g += kHeads) {
        bad |= score_heads<kHeads, Capped>(q, g, block, ahead, log_count, x, stride, most);
    }
    for (; g + 2 <= q.rows; g += 2) bad |= score_heads<2, Capped>(q, g, block, ahead, log_count, x, stride, most);
    if (g < q.rows) bad |= score_heads<1, Capped>(q, g, block, ahead, log_count, x, stride, most);
    return bad;
}

uint16_t score_block(const PageQuery& q, const unsigned char* block, const unsigned char* ahead, const float* log_count,
                     float* x, int64_t stride, float* most) {
    return q.softcap > 0 ? score_all<true>(q, block, ahead, log_count, x, stride, most)
                         : score_all<false>(q, block, ahead, log_count, x, stride, most);
}

void count_votes(const float* e, int64_t stride, const float* share, int32_t rows, int32_t n, bool sum,
                 const uint16_t* there, float* vote) {
    for (int i = 0; i < n; i += 16) {
        V total = zero();
        for (int g = 0; g < rows; ++g) {
            const V by = set1(share[g]), x = load(e + g * stride + i);
            total = sum ? fma(by, x, total) : max(mul(x, by), total);
        }
        store(vote + i, blend(there[i / 16], total, set1(-1.0f)));
    }
}

KV_INLINE float sum_lanes(V x) {
    float lanes[16];
    store(lanes, x);
    for (int step = 8; step; step /= 2) {
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    }
    return lanes[0];
}

float largest(const float* x, int32_t n) {
    V most = set1(kMinusInf);
    for (int i = 0; i < n; i += 16) most = max(load(x + i), most);
    return n ? max_lane(most) : kMinusInf;
}

float exp_sum(float* x, float m, int32_t n) {
    V total = zero();
    const V by = set1(m);
    for (int i = 0; i < n; i += 16) {
        const V e = exp(sub(load(x + i), by));
        store(x + i, e);
        total = add(total, e);
    }
    return sum_lanes(total);
}

float sum(const float* x, int32_t n) {
    V total = zero();
    for (int i = 0; i < n; i += 16) total = add(total, load(x + i));
    return sum_lanes(total);
}

int32_t next_above(const float* x, int32_t from, int32_t n, float least) {
    const V by = set1(least);
    for (int i = from / 16 * 16; i < n; i += 16) {
        uint32_t bits = less(by, load(x + i));
        if (i < from) bits &= ~0u << (from - i);
        if (bits) return i + __builtin_ctz(bits);
    }
    return n;
}

int32_t first_largest(const float* x, int32_t n) {
    const V most = set1(largest(x, n));
    for (int i = 0; i < n; i += 16) {
        const uint32_t bits = static_cast<uint16_t>(~less(load(x + i), most));
        if (bits) return i + __builtin_ctz(bits);
    }
    return 0;
}

void distances(const float* k, const float* x, int32_t dim, float* squares) {
    V sums[4] = {zero(), zero(), zero(), zero()};
    for (int d = 0; d < dim; ++d) {
        const V apart = sub(load(k + d * kSlots), set1(x[d]));
        sums[d % 4] = fma(apart, apart, sums[d % 4]);
    }
    store(squares, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

}  // namespace

void fill_summaries(Kernels* table) {
    table->score_block[0] = table->score_block[2] = score_block;
    table->count_votes = count_votes;
    table->largest = largest;
    table->exp_sum = exp_sum;
    table->sum = sum;
    table->next_above = next_above;
    table->first_largest = first_largest;
    table->distances = distances;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_summaries(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
