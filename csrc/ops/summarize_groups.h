// summarize_groups: what is known of 32 pages that follow each other without a look at their summaries, from those.
//
//   n_p = visible slots of a page      mu_p = s_p * (code_p - 128), of its summary (summarize.h)
//   m = sum_p n_p mu_p / sum_p n_p     s, code: of m, as a page's mean has them; spread and radius 0
//
// Sixteen groups to a block of kind mean. A group without a visible slot: codes 128, the rest 0. A visible page whose scale is
// NaN: scale NaN, codes 128. Sums in f32 in the order of the pages.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata::ops {

inline constexpr int kLeastGroups = 4;  // that select looks into, as those who call it have it
inline constexpr int kGroupPages = 32, kGroupBlocks = kGroupPages / kSlots;

// Kinds of summaries of which groups can be made.
constexpr bool has_groups(SummaryKind kind) { return kind == SummaryKind::mean || kind == SummaryKind::mean_value; }

struct GroupItem {
    const unsigned char* from[kGroupBlocks];  // blocks of summaries of kind mean or mean_value
    const uint16_t* visible;                  // [32] slot masks
    unsigned char* block;
    int32_t lane;  // 0..15
};

struct SummarizeGroupsParams {
    const GroupItem* items;  // [n], no two of one block and lane
    int32_t n_items;
    int32_t head_dim;  // D, a multiple of 16 in 32..512
    int32_t threads;
};

void summarize_groups(const SummarizeGroupsParams& params, const Where& where = {});

}  // namespace kvstrata::ops
