// cluster: groups the keys of each row into pages of 16 that resemble each other: spherical k-means, then exactly 16 a page.
//
//   n live tokens in index order, C = ceil(n / 16) pages
//   y_i = k_i - mean(k)                            unit(x) = x / |x|, unit(0) = 0
//   z_j = unit(y at floor((2j + 1) n / 2C))        iters times: a_i = argmax_j y_i . z_j; z_j = unit(sum of y_i, a_i = j)
//   s_ij = y_i . z_j                               an empty or zero sum keeps the old z_j
//
// Seats, 16 a page. Rounds c = 0..min(4, C) - 1: each unseated token bids for its c-th best page with priority
// s(c) - s(c + 1) (no next: 0); a page takes bids by falling priority while it has room. Then up to 8 rounds in which each
// bids for its best page with room, priority s_ij. The rest fill free seats in index order. Ties: lower page, lower token.
//
// cluster_greedy: until all are placed, the seed is the unplaced key of largest |y_i|, its page the seed and its 15 unplaced keys
// of largest y . y_seed, ties the lower token; pages in the order of their seeds. O(n^2).
//
// A shift of all keys changes nothing: attention does not see it. Sums in f32 in token order: the same bits twice at one
// level, whatever the threads; levels may differ where keys are not well apart. A key that is not finite lands somewhere.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata::ops {

inline constexpr int kMaxClusterTokens = 1 << 16;

struct ClusterRow {                 // one class of tokens of a segment: one format, one set
    const float* keys;              // [T, D] contiguous
    const uint8_t* live;            // [T], or null: all
    int32_t* page_of;               // [T] out: -1 where not live
    int32_t tokens;                 // T
    int32_t pages;                  // out: C
    int32_t* page_count = nullptr;  // [1] out on a CUDA device alone: C, instead of `pages`
};

struct ClusterParams {
    ClusterRow* rows;  // [R]
    int32_t n_rows;
    int32_t head_dim;  // D, 1..512
    int32_t iters;     // >= 0; not read by cluster_greedy
    void* workspace;   // cluster_workspace_bytes(params) bytes, or cluster_greedy's, 64-byte aligned
    int32_t threads;
};

int64_t cluster_workspace_bytes(const ClusterParams& params, const Where& where = {});
void cluster(const ClusterParams& params, const Where& where = {});
int64_t cluster_greedy_workspace_bytes(const ClusterParams& params, const Where& where = {});
void cluster_greedy(const ClusterParams& params, const Where& where = {});

}  // namespace kvstrata::ops
