// Bounds of keys by channel, and sixteen pages' bounds against query heads.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "cpu/kernels/page_score.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr int kHeads = 4;  // query heads that visit a block together

void turn_keys(const float* k, int32_t dim, float* rows) {
    float turned[kSlots][16];
    const void* from[16];
    for (int d = 0; d < dim; d += 16) {
        for (int i = 0; i < 16; ++i) from[i] = k + (d + i) * kSlots;
        transpose(from, 0, turned);
        for (int slot = 0; slot < kSlots; ++slot) store(rows + slot * dim + d, load(turned[slot]));
    }
}

bool stretch(float* lo, float* hi, const float* x, int32_t n) {
    const V inf = set1(__builtin_inff());
    uint16_t finite = 0xFFFF;
    for (int i = 0; i < n; i += 16) {
        const V now = load(x + i);
        store(lo + i, min(now, load(lo + i)));
        store(hi + i, max(now, load(hi + i)));
        finite &= less(bits_and(now, kMagnitude), inf);
    }
    return finite == 0xFFFF;
}

// Each channel's bound is the larger of its two products: that with hi where q is positive, else that with lo.
template <int Heads, bool Capped>
KV_INLINE uint16_t score_heads(const PageQuery& q, int first, const unsigned char* block, const unsigned char* ahead,
                               const float* log_count, float* x, int64_t stride, float* most) {
    const unsigned char *const lower = block, *const upper = block + q.dim * 2 * kSlots;  // common/layout.h
    V even[Heads], odd[Heads];
    for (int g = 0; g < Heads; ++g) even[g] = odd[g] = zero();
    for (int d = 0; d < q.dim; d += 2) {
        prefetch(ahead + d * 64);
        prefetch(ahead + (d + 1) * 64);
        const V lo = load_bf16(lower + d * 32), hi = load_bf16(upper + d * 32);
        const V next_lo = load_bf16(lower + (d + 1) * 32), next_hi = load_bf16(upper + (d + 1) * 32);
        for (int g = 0; g < Heads; ++g) {
            const float* const up = q.up + (first + g) * q.dim + d;
            const float* const down = q.down + (first + g) * q.dim + d;
            even[g] = fma(set1(up[0]), hi, fma(set1(down[0]), lo, even[g]));
            odd[g] = fma(set1(up[1]), next_hi, fma(set1(down[1]), next_lo, odd[g]));
        }
    }
    const V count = load(log_count);
    const uint16_t there = differ(count, set1(-__builtin_inff()));
    uint16_t bad = 0;
#pragma GCC unroll 4
    for (int g = 0; g < Heads; ++g) {
        const V score = score_of<Capped>(q, first + g, add(even[g], odd[g]), count);
        bad |= put_score(first + g, score, there, x + (first + g) * stride, most);
    }
    return bad;
}

template <bool Capped>
KV_INLINE uint16_t score_all(const PageQuery& q, const unsigned char* block, const unsigned char* ahead,
                             const float* log_count, float* x, int64_t stride, float* most) {
    int g = 0;
    uint16_t bad = 0;
    for (; g + kHeads <= q.rows; g += kHeads) {
        bad |= score_heads<kHeads, Capped>(q, g, block, ahead, log_count, x, stride, most);
    }
    for (; g < q.rows; ++g) bad |= score_heads<1, Capped>(q, g, block, ahead, log_count, x, stride, most);
    return bad;
}

uint16_t score_bounds(const PageQuery& q, const unsigned char* block, const unsigned char* ahead,
                      const float* log_count, float* x, int64_t stride, float* most) {
    return q.softcap > 0 ? score_all<true>(q, block, ahead, log_count, x, stride, most)
                         : score_all<false>(q, block, ahead, log_count, x, stride, most);
}

}  // namespace

void fill_bounds(Kernels* table) {
    table->turn_keys = turn_keys;
    table->stretch = stretch;
    table->score_block[1] = score_bounds;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_bounds(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
