// append: write tokens into slots of full-format pages.
//
//   page[dst].K[:, slot] = k[r, t, :]     page[dst].V[slot, :] = v[r, t, :]     positions[dst, slot] = pos
//
// Dimensions D..Dp of the page (D padded to 16) are written as zeros. Elements are converted from `dtype` to the page's
// format by round-to-nearest-even; equal types are copied bit for bit, NaN payloads included. A token whose page id is -1
// is skipped. Slots that are not named keep their bytes. No two tokens of one call may name the same (page, slot);
// a row's tokens of one page follow each other (skipped ones aside), and no page is named by two rows.
#pragma once

#include "ops/pool_view.h"

namespace kvstrata::ops {

struct AppendRow {     // one (sequence, KV head)
    const void* k;     // [T, D], token t at k + token(t) * k_stride elements; last dimension contiguous
    const void* v;     // [T, D]
    int64_t k_stride;  // elements between tokens
    int64_t v_stride;
    const int32_t* tokens;     // [T] index of token t along the strided axis, or null: 0, 1, 2, ...
    const PageId* pages;       // [T] destination page, -1 = skip
    const uint8_t* slots;      // [T] destination slot, 0..15
    int32_t count;             // T
    int32_t position;          // position of token 0; token t has position + t
    const int32_t* positions;  // [T] of each token, where ops run, or null: by `position`
};

struct AppendParams {
    const AppendRow* rows;  // [R]
    int32_t n_rows;
    int32_t head_dim;       // D, 1..512
    DType dtype;            // of k and v: f32, bf16, f16
    const PoolView* pools;  // [8]
    int32_t threads;
};

void append(const AppendParams& params, const Where& where = {});

}  // namespace kvstrata::ops
