// pack, unpack: between the arrangement inside a page and canonical [16][D] elements, losslessly.
//
//   unpack: k[p, slot, d] = page[p].K(slot, d)      v likewise      (elements in the page's own format)
//   pack:   the inverse; dimensions D..Dp of the page become zeros
//
// Quantized pages: k, v are codes, one i8 each (int8, int4: signed; int2: 0..3; pack stores the low bits), and scales are
// canonical as they lie in the page: bf16 [2 (K, V), groups, 16].
//
// Bytes only: no element is converted, NaN payloads survive. Every slot of every named page is written.
#pragma once

#include "ops/pool_view.h"

namespace kvstrata::ops {

struct PackParams {
    const PageId* pages;    // [P], none negative
    int32_t n_pages;        // P
    int32_t head_dim;       // D
    void* k;                // [P, 16, D] contiguous, elements of the page's format or i8 (pack reads, unpack writes)
    void* v;                // [P, 16, D]
    const PoolView* pools;  // [8]
    int32_t threads = 1;
    uint16_t* scales = nullptr;  // bf16 [P, 2, groups, 16] contiguous; null only if no page is quantized
};

void pack(const PackParams& params, const Where& where = {});
void unpack(const PackParams& params, const Where& where = {});

}  // namespace kvstrata::ops
