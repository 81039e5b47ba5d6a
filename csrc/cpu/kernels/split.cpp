// Sixteen summaries of parts of pages against query heads: means of a pair of parts lie in the nibbles of a byte.
#include "cpu/kernels/level.h"
#if KV_DOT_KERNELS
#include "common/layout.h"
#include "cpu/kernels/add_means.h"
#include "cpu/kernels/page_score.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr int kHeads = 4;  // query heads that visit a block together
constexpr float kMinusInf = -__builtin_inff();

// What a block knows of the parts of its pages; counts are of visible slots.
template <int Pairs>
struct Parts {
    V scale[2 * Pairs], spread[2 * Pairs], count[2 * Pairs];
    uint16_t some[2 * Pairs];  // lanes that have a visible slot in the part
};

KV_INLINE float count_bits(uint32_t x) {  // of 16 bits
    x -= x >> 1 & 0x5555;
    x = (x & 0x3333) + (x >> 2 & 0x3333);
    x = (x + (x >> 4)) & 0x0F0F;
    return static_cast<float>((x + (x >> 8)) & 31);
}

// Places in a block, as common/layout.h has them; that file's functions are shared with other levels.
KV_INLINE int64_t pair_at(int32_t dim, int pair) { return pair * kSlots * static_cast<int64_t>(dim); }
KV_INLINE int64_t facts_at(int32_t dim, int pairs, int line) { return pair_at(dim, pairs) + 4 * kSlots * line; }

template <int Pairs>
KV_INLINE Parts<Pairs> parts_of(const unsigned char* block, int32_t dim, const uint16_t* masks) {
    Parts<Pairs> parts;
    for (int pair = 0; pair < Pairs; ++pair) {
        const int at = 2 * pair;
        pairs_bf16(block + facts_at(dim, Pairs, pair), parts.scale[at], parts.scale[at + 1]);
        pairs_bf16(block + facts_at(dim, Pairs, Pairs + pair), parts.spread[at], parts.spread[at + 1]);
    }
    const uint32_t* const slots = reinterpret_cast<const uint32_t*>(block + facts_at(dim, Pairs, 2 * Pairs));
    float counts[2 * Pairs][kSlots];
    for (int i = 0; i < kSlots; ++i) {
        const uint32_t second = slots[i], high = slots[i] >> 16, mask = masks[i];
        counts[0][i] = count_bits(mask & ~high & ~second);
        counts[1][i] = count_bits(mask & ~high & second);
        if constexpr (Pairs == 2) {
            counts[2][i] = count_bits(mask & high & ~second);
            counts[3][i] = count_bits(mask & high & second);
        }
    }
    for (int i = 0; i < 2 * Pairs; ++i) {
        parts.count[i] = load(counts[i]);
        parts.some[i] = less(zero(), parts.count[i]);
    }
    return parts;
}

// The log of sum count e^x; a part without visible slots does not enter. NaN of another shows.
template <int Pairs>
KV_INLINE V log_sum(const Parts<Pairs>& parts, V (&x)[2 * Pairs]) {
    V most = set1(kMinusInf), sum = zero();
    for (int i = 0; i < 2 * Pairs; ++i) {
        x[i] = blend(parts.some[i], x[i], set1(kMinusInf));
        most = max(x[i], most);
    }
    for (int i = 0; i < 2 * Pairs; ++i) sum = fma(parts.count[i], exp(sub(x[i], most)), sum);
    return add(most, log_small(sum));
}

// x of Heads heads by the means of a pair.
template <int Heads, bool Capped, int Pairs>
KV_INLINE void score_pair(const PageQuery& q, int first, int pair, const unsigned char* block,
                          const unsigned char* ahead, const Parts<Pairs>& parts, V (&x)[Heads][2 * Pairs]) {
    const unsigned char* const lines = block + pair_at(q.dim, pair);
    I sums[2][Heads];
    for (int g = 0; g < Heads; ++g) sums[0][g] = sums[1][g] = none();
#pragma GCC unroll 2
    for (int d = 0; d < q.dim; d += 4) {
        prefetch(ahead + pair_at(q.dim, pair) + d * kSlots);
        const I line = load_line(lines + d * kSlots), low = low_nibbles(line), high = high_nibbles(line);
        for (int g = 0; g < Heads; ++g) {
            const int64_t at = static_cast<int64_t>(first + g) * q.dim + d;
            sums[0][g] = add_means(sums[0][g], low, q.codes + at, q.pairs + at);
            sums[1][g] = add_means(sums[1][g], high, q.codes + at, q.pairs + at);
        }
    }
    for (int g = 0; g < Heads; ++g) {
        const V shift = set1(static_cast<float>(q.shift[first + g]));  // below 2^24: exact
        for (int i = 0; i < 2; ++i) {
            const int part = 2 * pair + i;
            const V dot = mul(sub(to_f32(sums[i][g]), shift), parts.scale[part]);
            const V curved = mul(set1(q.curvature[first + g]), parts.spread[part]);
            x[g][part] = score_of<Capped>(q, first + g, dot, curved);
        }
    }
}

template <int Heads, bool Capped, int Pairs>
KV_INLINE uint16_t score_heads(const PageQuery& q, int first, const unsigned char* block, const unsigned char* ahead,
                               const Parts<Pairs>& parts, float* x, int64_t stride, float* most) {
    V of_parts[Heads][2 * Pairs];
    for (int pair = 0; pair < Pairs; ++pair) score_pair<Heads, Capped>(q, first, pair, block, ahead, parts, of_parts);
    uint16_t there = 0;
    for (const uint16_t some : parts.some) there |= some;
    uint16_t bad = 0;
    for (int g = 0; g < Heads; ++g) {
        bad |= put_score(first + g, log_sum(parts, of_parts[g]), there, x + (first + g) * stride, most);
    }
    return bad;
}

template <int Pairs, bool Capped>
KV_INLINE uint16_t score_all(const PageQuery& q, const unsigned char* block, const unsigned char* ahead,
                             const uint16_t* masks, float* x, int64_t stride, float* most) {
    for (int line = 0; line <= 2 * Pairs; ++line) prefetch(ahead + facts_at(q.dim, Pairs, line));
    const Parts<Pairs> parts = parts_of<Pairs>(block, q.dim, masks);
    int g = 0;
    uint16_t bad = 0;
    for (; g + kHeads <= q.rows; g += kHeads) {
        bad |= score_heads<kHeads, Capped>(q, g, block, ahead, parts, x, stride, most);
    }
    for (; g < q.rows; ++g) bad |= score_heads<1, Capped>(q, g, block, ahead, parts, x, stride, most);
    return bad;
}

template <int Pairs>
uint16_t score_split(const PageQuery& q, const unsigned char* block, const unsigned char* ahead, const uint16_t* masks,
                     float* x, int64_t stride, float* most) {
    return q.softcap > 0 ? score_all<Pairs, true>(q, block, ahead, masks, x, stride, most)
                         : score_all<Pairs, false>(q, block, ahead, masks, x, stride, most);
}

}  // namespace

void fill_split(Kernels* table) {
    table->score_split[0] = score_split<1>;
    table->score_split[1] = score_split<2>;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_split(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
