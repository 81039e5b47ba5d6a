// The window queries of a row: its last W queries, and the pages that they look at. score_window and measure share it.
//
//   A[g, t, k, i] = exp(z[g, t, k, i] - lse[g, t])        z as in attend.h; lse over every slot that query t may read
//
// A slot may be read if its bit in `visible` is set, its entry's page is not -1, its position is not later than that of
// the query, and, if a window is given, q_pos - pos < window.
#pragma once

#include "ops/pool_view.h"

namespace kvstrata::ops {

inline constexpr int kMaxWindowQueries = 256;  // W

struct WindowRow {       // one (sequence, KV head)
    const void* q;       // [T, G, D] by the strides below; last dimension contiguous
    int64_t q_stride_t;  // elements
    int64_t q_stride_g;
    const int32_t* tokens;    // [T] index of query t along the strided T axis of q, or null: 0, 1, 2, ...
    const int32_t* q_pos;     // [T] positions of the queries, or null: every visible slot is earlier
    const PageId* pages;      // [M]
    const uint16_t* visible;  // [M] slot masks, or null: all slots
    const float* centre;      // [D] of the keys of quantized pages (quantize.h), or null: zeros
    const float* sinks;       // [G] sink logits, part of every lse, or null
    int32_t entries;          // M
    int32_t queries;          // T <= W; 0: nothing is scored
};

struct WindowParams {
    const WindowRow* rows;  // [R]
    int32_t n_rows;
    int32_t group;          // G query heads per KV head, 1..16
    int32_t head_dim;       // D, 1..512
    DType q_dtype;          // f32, bf16, f16
    const PoolView* pools;  // [8]; positions are read where q_pos is given
    float scale;            // finite
    float softcap;          // 0: none
    int32_t window;         // 0: none; needs q_pos
    void* workspace;        // workspace bytes of the op, 64-byte aligned; may be null if that is 0
    int32_t threads;
};

}  // namespace kvstrata::ops
