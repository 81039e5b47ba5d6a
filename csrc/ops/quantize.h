// quantize, dequantize: tokens into and out of quantized pages.
//
//   from a full page:        codes, scales = encode(R (k - centre[row])), encode(R v)       R: rotate.h
//   from a quantized page:   codes, scales = encode(decode(codes, scales))                  into fewer bits only
//   dequantize:              k = R^-1 decode(codes, scales) + centre[row]                   v without centre
//
// encode, for each group of a vector (common/layout.h), with a = max |x|, up() = the magnitude's next bf16 at or above:
//   int8   s = up(a / 127)                       c = clamp(rne(x * (1 / s)), -127, 127)        decoded s * c
//   int4   s = up(x_m / -8), sign kept           c = clamp(rne(x * (1 / s)), -8, 7)            decoded s * c
//          x_m: element of largest magnitude, the lowest index on ties
//   int2   h = up(f * a / 3)                     c = clamp(floor(x * (1 / (2h)) + 2), 0, 3)    decoded h * (2c - 3)
//          f of 1, .9, .8, .7, .6, .5 with the least sum of (x - decoded)^2, the larger f on ties; 16 partial sums over
//          d mod 16, then a tree of neighbours: (0 + 1) + (2 + 3) ...
// a < 2^-100: scale and codes 0. NaN or Inf in a group: scale NaN (0x7FC0), codes 0.
// f32 with IEEE division and no contraction in this order: codes and scales have the same bits everywhere.
//
// A token's position moves with it. Slots that no move names keep their bytes.
#pragma once

#include "ops/move.h"

namespace kvstrata::ops {

struct QuantizeParams {
    const Move* moves;      // [n]
    const float* centre;    // [R, D] contiguous, or null: zeros. Not read for moves from quantized pages
    const int32_t* row_of;  // [n] row of centre; null only if centre is
    int32_t n_moves;        // n
    int32_t head_dim;       // D, a multiple of 16 in 32..512
    const PoolView* pools;  // [8]
    int32_t threads;
};

struct DequantizeParams {
    const PageId* pages;    // [P], none negative; of any format: full pages are only widened to f32
    const float* centre;    // [R, D] contiguous, or null: zeros. Not added to full pages
    const int32_t* row_of;  // [P] row of centre; null only if centre is
    int32_t n_pages;        // P
    int32_t head_dim;       // D
    float* k;               // [P, 16, D] contiguous
    float* v;               // [P, 16, D] contiguous
    const PoolView* pools;  // [8]
    int32_t threads;
};

void quantize(const QuantizeParams& params, const Where& where = {});
void dequantize(const DequantizeParams& params, const Where& where = {});

}  // namespace kvstrata::ops
