// attend: attention of each row's queries over a list of pages.
//
//   z   = scale * q . k_i                                        (f32)
//   z   = scale * (sum_j s_j * (q'_j . c_j) + q . centre)        quantized pages: q' = R q (rotate.h), groups j (quantize.h)
//   z   = softcap * tanh(z / softcap)                            if softcap > 0
//   z   = z + bias[k, i]                                         -inf where the slot may not be read
//   lse = log(sum exp z + exp sink[g])      out = sum exp(z - lse) * v_i
//
// A slot may not be read if its bit in `visible` is 0, its entry's page is -1, it is one of this call's own tokens later
// than the query (`own`, or its bit in `tree` is 0), or a window is given and not q_pos - pos < window.
// `own`: the last `own` visible slots of the row are this call's tokens in order; query t sees all earlier slots and own
// tokens 0..t, or, with `tree`, own token j where bit j of tree[t] is set (own <= 64 then).
//
// Pages of all formats of a list share one softmax. Quantized ones: R q = delta * n with delta = max |R q| / 32639 over the
// query row and n rounded to 16 bits, so q'_j . c_j is delta times an exact whole number and z (without softcap) has the
// same bits at every level; p * s of a block's slots and a group of dims likewise. Their part of out is rotated back once.
// A block is up to eight successive pages of one format that some query of the tile reads; a softmax step is one block.
//
// Nothing visible: out = 0, lse = -inf (or the sink). NaN and Inf in q or in a visible slot show in their own rows only;
// hidden slots, padding and entries of -1 never enter arithmetic.
//
// Splits. A row of M entries (without trailing -1) is cut into chunks of c(M) = clamp(2^floor(log2(M / 64)), 8, 64)
// entries; partials are merged in order of the list, so bits depend on the row alone, never on threads or neighbours.
#pragma once

#include "ops/pool_view.h"

namespace kvstrata::ops {

struct AttendRow {       // one (sequence, KV head)
    const void* q;       // [T, G, D] by the strides below; last dimension contiguous
    int64_t q_stride_t;  // elements
    int64_t q_stride_g;
    void* out;             // [T, G, D]
    int64_t out_stride_t;  // elements
    int64_t out_stride_g;
    float* lse;  // [G, T] by the strides below, or null
    int64_t lse_stride_t;
    int64_t lse_stride_g;
    const int32_t* tokens;    // [T] index of query t along the strided T axis of q, out and lse, or null: 0, 1, 2, ...
    const PageId* pages;      // [M]
    const uint16_t* visible;  // [M] slot masks, or null: all slots
    const float* bias;        // [M, 16] or null
    const float* sinks;       // [G] sink logits or null
    const int32_t* q_pos;     // [T] positions of the queries; null unless window > 0
    const uint64_t* tree;     // [T] or null
    const float* centre;      // [D] subtracted from the keys of quantized pages before rotation, or null: zeros
    float* logits;            // [G, T, M, 16] receives z (-inf where unread), or null
    int32_t entries;          // M
    int32_t queries;          // T
    int32_t own;              // 0..T (tree: 0..64)
};

struct AttendParams {
    const AttendRow* rows;  // [R]
    int32_t n_rows;
    int32_t group;          // G query heads per KV head, 1..16
    int32_t head_dim;       // D, 1..512
    DType q_dtype;          // f32, bf16, f16
    DType out_dtype;        // f32, bf16, f16
    const PoolView* pools;  // [8]
    float scale;            // finite
    float softcap;          // 0: none
    int32_t window;         // 0: none
    void* workspace;        // workspace_bytes(params) bytes, 64-byte aligned; may be null if that is 0
    int32_t threads;
};

int64_t attend_workspace_bytes(const AttendParams& params, const Where& where = {});
void attend(const AttendParams& params, const Where& where = {});

}  // namespace kvstrata::ops
