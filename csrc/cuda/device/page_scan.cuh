// Query heads against blocks of sixteen page summaries: x of ops/score_pages.h, which score_pages, select and estimate share.
//
// Means: a line of a block is one 32-bit word of each of 16 pages, which is what an mma m16n8k32 takes as A if its row a is
// page 2a and its row a + 8 page 2a + 1: a lane reads 8 bytes, a warp 256 consecutive ones, and needs no shuffle. Bounds: a
// lane sums every eighth channel of four pages for four heads at a time, in f32.
#pragma once

#include "common/layout.h"
#include "cuda/device/element.cuh"
#include "cuda/device/math.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/turn.cuh"
#include "ops/supported.h"

namespace kvstrata::cuda {

struct ScanSettings {
    int32_t group, head_dim;
    DType q_dtype;
    SummaryKind kind;
    float scale, weight, softcap;
    Rotation rotation;
};

// Words of a head's codes, zeros to a multiple of 32 dims, and four more: eight heads then lie in different banks.
constexpr int code_words(int head_dim) { return (head_dim + 31) / 32 * 8 + 4; }
constexpr int code_heads(int group) { return (group + 7) / 8 * 8; }

// Bytes of dynamic shared memory that a PageScan takes, a multiple of 16.
__host__ __device__ inline size_t scan_bytes(const ScanSettings& s) {
    const int codes = s.kind == SummaryKind::bounds ? 0 : code_heads(s.group) * code_words(s.head_dim);
    return 4 * static_cast<size_t>(3 * ops::kMaxGroup + s.group * s.head_dim + codes);
}

// The query heads of a row, at the beginning of dynamic shared memory.
class PageScan {
  public:
    // x of one head for two successive pages.
    struct Pair {
        float x[2];
    };

    // The query heads, `stride` elements apart. The whole block calls it; a barrier closes it.
    __device__ PageScan(const ScanSettings& s, const void* q, int64_t stride) : s_(s) {
        factor_ = reinterpret_cast<float*>(dynamic_shared());
        curvature_ = factor_ + ops::kMaxGroup;
        shift_ = reinterpret_cast<int32_t*>(curvature_ + ops::kMaxGroup);
        q_ = curvature_ + 2 * ops::kMaxGroup;
        codes_ = reinterpret_cast<uint32_t*>(q_ + s.group * s.head_dim);
        words_ = code_words(s.head_dim);
        for (int g = warp(); g < s.group; g += warps()) load(g, q, g * stride);
        if (s.kind != SummaryKind::bounds) {
            for (int i = static_cast<int>(threadIdx.x); i < code_heads(s.group) * words_;
                 i += static_cast<int>(blockDim.x)) {
                const int g = i / words_, word = i % words_;
                if (g >= s.group || word >= s.head_dim / 4) codes_[i] = 0;
            }
        }
        __syncthreads();
    }

    // put(head, page, pair), page even, by the lane that has it: every head with every page of the block. masks(page): its
    // visible slots; 0: x is -inf. Returns the pages with a visible slot that cannot be ranked. A warp calls it.
    template <class Masks, class Put>
    __device__ uint32_t score(const unsigned char* block, Masks masks, Put put) const {
        uint32_t bad = 0;
        if (s_.kind == SummaryKind::bounds) {
            for (int g = 0; g < s_.group; g += kHeads) bad |= score_bounds(g, block, masks, put);
        } else if (s_.kind == SummaryKind::halves) {
            for (int g = 0; g < s_.group; g += 8) bad |= score_parts<1>(g, block, masks, put);
        } else if (s_.kind == SummaryKind::quarters) {
            for (int g = 0; g < s_.group; g += 8) bad |= score_parts<2>(g, block, masks, put);
        } else if (s_.group <= 8) {
            bad = score_means<1>(block, masks, put);
        } else {
            bad = score_means<2>(block, masks, put);
        }
        return __reduce_or_sync(kAllLanes, bad);
    }

  private:
    static constexpr int kHeads = 4;  // that sum bounds together

    __device__ float element(const void* q, int64_t i) const {
        if (s_.q_dtype == DType::f32) return static_cast<const float*>(q)[i];
        if (s_.q_dtype == DType::bf16) return load_element(static_cast<const __nv_bfloat16*>(q) + i);
        return load_element(static_cast<const __half*>(q) + i);
    }

    // A head, by a warp: f32, or R q as codes and what its logits are multiplied by.
    __device__ void load(int g, const void* q, int64_t from) {
        float* const x = q_ + g * s_.head_dim;
        float square = 0.0f;
        for (int d = lane(); d < s_.head_dim; d += kWarp) {
            x[d] = element(q, from + d);
            square = fmaf(x[d], x[d], square);
        }
        square = warp_sum(square);
        const float poison = square - square;  // NaN and Inf of the query show
        if (s_.kind == SummaryKind::bounds) {
            if (lane() == 0) factor_[g] = s_.scale + poison;
            return;
        }
        turn(x, s_.rotation, false);
        float most = 0.0f;
        for (int d = lane(); d < s_.head_dim; d += kWarp) most = fmaxf(most, fabsf(x[d]));
        most = warp_max(most);
        const float delta = __fdiv_rn(most, 127.0f), by = delta > 0.0f ? __fdiv_rn(1.0f, delta) : 0.0f;
        auto* const codes = reinterpret_cast<int8_t*>(codes_ + g * words_);
        int sum = 0;
        for (int d = lane(); d < s_.head_dim; d += kWarp) {
            const int code = max(-127, min(127, __float2int_rn(x[d] * by)));
            codes[d] = static_cast<int8_t>(code);
            sum += code;
        }
        sum = __reduce_add_sync(kAllLanes, sum);
        if (lane() == 0) {
            shift_[g] = (is_split(s_.kind) ? kZeroNibble : kZeroCode) * sum;
            factor_[g] = s_.scale * delta + poison;
            curvature_[g] = 0.5f * s_.weight * s_.scale * s_.scale * square;
        }
    }

    // The logit of head g, and `rest` added to it.
    __device__ float score_of(int g, float dot, float rest) const {
        if (!(s_.softcap > 0)) return fmaf(factor_[g], dot, rest);
        return s_.softcap * tanh_(__fdiv_rn(factor_[g] * dot, s_.softcap)) + rest;
    }

    // Of head g with two pages.
    template <class Put>
    __device__ static uint32_t finish(int g, int page, const float (&x)[2], const uint32_t (&mask)[2], Put put) {
        Pair pair;
        uint32_t bad = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            pair.x[i] = mask[i] ? x[i] : -INFINITY;
            if (mask[i] && !isfinite(x[i])) bad |= 1u << (page + i);
        }
        put(g, page, pair);
        return bad;
    }

    __device__ static float log_count(uint32_t mask) { return logf(static_cast<float>(__popc(mask))); }

    template <int Tiles, class Masks, class Put>
    __device__ uint32_t score_means(const unsigned char* block, Masks masks, Put put) const {
        const int a = lane() / 4, b = lane() % 4, lines = s_.head_dim / 4, page = 2 * a;
        const uint2* const words = reinterpret_cast<const uint2*>(block) + a;
        int32_t sums[Tiles][4] = {};
#pragma unroll 4
        for (int line = b; line < lines; line += 8) {
            const uint2 low = words[line * 8];
            const uint2 high = line + 4 < lines ? words[(line + 4) * 8] : make_uint2(0, 0);
            const uint32_t pages[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
            for (int t = 0; t < Tiles; ++t) {
                const uint32_t* const q = codes_ + (8 * t + a) * words_ + line;
                const uint32_t heads[2] = {q[0], q[4]};
                mma_u8s8(sums[t], pages, heads);
            }
        }
        const auto* const facts = reinterpret_cast<const float*>(block + kSlots * s_.head_dim) + page;
        const uint32_t mask[2] = {masks(page), masks(page + 1)};
        float scale[2], spread[2], count[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            scale[i] = facts[i], spread[i] = facts[kSlots + i], count[i] = log_count(mask[i]);
        }
        uint32_t bad = 0;
#pragma unroll
        for (int c = 0; c < 2 * Tiles; ++c) {
            const int g = c / 2 * 8 + 2 * b + c % 2;
            if (g >= s_.group) continue;
            float x[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float dot = static_cast<float>(sums[c / 2][2 * i + c % 2] - shift_[g]) * scale[i];  // below 2^24
                x[i] = score_of(g, dot, fmaf(curvature_[g], spread[i], count[i]));
            }
            bad |= finish(g, page, x, mask, put);
        }
        return bad;
    }

    // Heads first..first + 7 by the means of parts of each page, those of a pair in the nibbles of a byte.
    template <int Pairs, class Masks, class Put>
    __device__ uint32_t score_parts(int first, const unsigned char* block, Masks masks, Put put) const {
        const int a = lane() / 4, b = lane() % 4, page = 2 * a;
        constexpr int kParts = 2 * Pairs;
        int32_t sums[kParts][4] = {};
#pragma unroll
        for (int pair = 0; pair < Pairs; ++pair) {
            add_pair(first, block + pair_offset(s_.head_dim, pair), sums[2 * pair], sums[2 * pair + 1]);
        }
        const uint32_t mask[2] = {masks(page), masks(page + 1)};
        float scale[2][kParts], spread[2][kParts], count[2][kParts];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto fact = [&](int64_t at) { return reinterpret_cast<const uint32_t*>(block + at)[page + i]; };
            const uint32_t second = fact(part_slots_offset(s_.head_dim, Pairs)), high = second >> 16;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int pair = part / 2, half = 16 * (part % 2);
                const uint32_t slots = (pair ? high : ~high) & (half ? second : ~second);
                scale[i][part] =
                    from_bf16(static_cast<uint16_t>(fact(pair_scales_offset(s_.head_dim, Pairs, pair)) >> half));
                spread[i][part] =
                    from_bf16(static_cast<uint16_t>(fact(pair_spreads_offset(s_.head_dim, Pairs, pair)) >> half));
                count[i][part] = static_cast<float>(__popc(mask[i] & slots));
            }
        }
        uint32_t bad = 0;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int g = first + 2 * b + c;
            if (g >= s_.group) continue;
            float x[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float of_part[kParts];
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    const float dot = static_cast<float>(sums[part][2 * i + c] - shift_[g]) * scale[i][part];
                    of_part[part] = score_of(g, dot, curvature_[g] * spread[i][part]);
                }
                x[i] = log_sum(count[i], of_part);
            }
            bad |= finish(g, page, x, mask, put);
        }
        return bad;
    }

    // The products of both means of a pair, as those of score_means.
    __device__ void add_pair(int first, const unsigned char* block, int32_t (&low)[4], int32_t (&high)[4]) const {
        constexpr uint32_t kNibbles = 0x0F0F0F0Fu;
        const int a = lane() / 4, lines = s_.head_dim / 4;
        const uint2* const words = reinterpret_cast<const uint2*>(block) + a;
#pragma unroll 4
        for (int line = lane() % 4; line < lines; line += 8) {
            const uint2 here = words[line * 8];
            const uint2 there = line + 4 < lines ? words[(line + 4) * 8] : make_uint2(0, 0);
            const uint32_t* const q = codes_ + (first + a) * words_ + line;
            const uint32_t heads[2] = {q[0], q[4]};
            const uint32_t four[4] = {here.x, here.y, there.x, there.y};
            const uint32_t lower[4] = {four[0] & kNibbles, four[1] & kNibbles, four[2] & kNibbles, four[3] & kNibbles};
            const uint32_t upper[4] = {four[0] >> 4 & kNibbles, four[1] >> 4 & kNibbles, four[2] >> 4 & kNibbles,
                                       four[3] >> 4 & kNibbles};
            mma_u8s8(low, lower, heads);
            mma_u8s8(high, upper, heads);
        }
    }

    // The log of sum count e^x; a part without visible slots does not enter. NaN of another shows.
    template <int Parts>
    __device__ static float log_sum(const float (&count)[Parts], const float (&x)[Parts]) {
        float most = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < Parts; ++i) most = count[i] > 0.0f && x[i] > most ? x[i] : most;
#pragma unroll
        for (int i = 0; i < Parts; ++i) sum = count[i] > 0.0f ? fmaf(count[i], exp_(x[i] - most), sum) : sum;
        return most + logf(sum);
    }

    // Heads first..first + 3. Each channel's bound is the larger of its two products: that with hi where q is positive, else
    // that with lo.
    template <class Masks, class Put>
    __device__ uint32_t score_bounds(int first, const unsigned char* block, Masks masks, Put put) const {
        const int quad = lane() % 4;
        const uint2* const lower = reinterpret_cast<const uint2*>(block) + quad;
        const uint2* const upper = reinterpret_cast<const uint2*>(block + upper_offset(s_.head_dim)) + quad;
        float sums[4 * kHeads] = {};  // [head][page]
#pragma unroll 2
        for (int d = lane() / 4; d < s_.head_dim; d += 8) {
            const uint2 low = lower[d * 4], high = upper[d * 4];
            const float lo[4] = {from_bf16(static_cast<uint16_t>(low.x)), from_bf16(static_cast<uint16_t>(low.x >> 16)),
                                 from_bf16(static_cast<uint16_t>(low.y)),
                                 from_bf16(static_cast<uint16_t>(low.y >> 16))};
            const float hi[4] = {
                from_bf16(static_cast<uint16_t>(high.x)), from_bf16(static_cast<uint16_t>(high.x >> 16)),
                from_bf16(static_cast<uint16_t>(high.y)), from_bf16(static_cast<uint16_t>(high.y >> 16))};
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                const float q = q_[min(first + h, s_.group - 1) * s_.head_dim + d];
                const float up = q > 0.0f ? q : 0.0f, down = q > 0.0f ? 0.0f : q;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[4 * h + i] = fmaf(up, hi[i], fmaf(down, lo[i], sums[4 * h + i]));
                }
            }
        }
        add_channels<8>(sums, 16);  // which leaves a lane one head and two pages
        add_channels<4>(sums, 8);
        add_channels<2>(sums, 4);
        const int g = first + lane() / 8, page = 4 * quad + lane() / 4 % 2 * 2;
        const uint32_t mask[2] = {masks(page), masks(page + 1)};
        if (g >= s_.group) return 0u;
        const float x[2] = {score_of(g, sums[0], log_count(mask[0])), score_of(g, sums[1], log_count(mask[1]))};
        return finish(g, page, x, mask, put);
    }

    // Adds what the lanes `step` apart hold of 2 Half sums; each keeps half of them.
    template <int Half>
    __device__ static void add_channels(float (&sums)[4 * kHeads], int step) {
        const bool upper = lane() & step;
#pragma unroll
        for (int i = 0; i < Half; ++i) {
            const float mine = upper ? sums[i + Half] : sums[i], theirs = upper ? sums[i] : sums[i + Half];
            sums[i] = mine + __shfl_xor_sync(kAllLanes, theirs, step);
        }
    }

    const ScanSettings& s_;
    float *q_, *factor_, *curvature_;
    int32_t* shift_;
    uint32_t* codes_;  // [G padded to 8][words_]
    int words_;
};

}  // namespace kvstrata::cuda
