// summarize: what is known of a page without reading it, from its visible slots as stored, R of rotate.h.
//
//   m = R mean(k)          s = max_c |m_c| / 127       code = clamp(rne(m_c / s), -127, 127) + 128       s = 0: all 128
//   mu = s * (code - 128)  spread = sum_i |R k_i - mu|^2 / (n D)                 radius = max_i |R k_i - mu|
//
// That is kind mean. mean_value adds the value mean R mean(v), coded as m is, with its own scale, and the mask of the slots
// it was made from. bounds instead, of the keys as the model has them, not rotated:
//
//   lo_c = down(min_i k_ic)    hi_c = up(max_i k_ic)    down, up: the bf16 at or below, at or above
//
// halves and quarters are several means in the place of one, in 4 bits, so that a key unlike the others of its page still shows:
// the visible slots are parted in two, a pair, of quarters each half once more. The second of two are the slots nearer to b than
// to a: at first a is the key farthest from the mean and b the key farthest from a, ties the lower slot; then, until no slot
// moves and at most kSplitRounds times, the means of the two; then the first is the one with the lowest slot. Slots that cannot be parted, equal keys, are all of the first; a
// part of no slot has codes 8, the rest 0. Of each other part
//
//   m = R mean(k)    s = up(max_c |m_c| / 7)    code = clamp(rne(m_c / s), -7, 7) + 8    spread = up(sum |R k_i - mu|^2 / (n D))
//
// Sixteen pages to a block, laid out as common/layout.h says. An entry of -1, or without a visible slot: codes 128, the
// rest 0. NaN or Inf in a visible key: scale NaN, codes 128, bounds NaN; in a visible value: its scale NaN, codes 128. They
// show in no other lane. So it is with parts: all scales NaN, codes 8, the rest 0.
#pragma once

#include "ops/pool_view.h"

namespace kvstrata::ops {

inline constexpr int kSplitRounds = 4;

struct SummaryItem {
    PageId page;          // -1: none
    uint16_t visible;     // slot mask
    const float* centre;  // [D] of the keys of quantized pages (quantize.h), or null: zeros
    unsigned char* block;
    int32_t lane;  // 0..15
};

struct SummarizeParams {
    const SummaryItem* items;  // [n], no two of one block and lane
    int32_t n_items;
    int32_t head_dim;       // D, a multiple of 16 in 32..512
    const PoolView* pools;  // [8]
    int32_t threads;
    SummaryKind kind = SummaryKind::mean;
};

void summarize(const SummarizeParams& params, const Where& where = {});

}  // namespace kvstrata::ops
