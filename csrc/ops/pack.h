// pack, unpack: between the arrangement inside a page and canonical [16][D] elements, losslessly.
//
//   unpack: k[p, slot, d] = page[p].K(slot, d)      v likewise      (elements in the page's own format)
//   pack:   the inverse; dimensions D..Dp of the page become zeros
//
// Bytes only: no element is converted, NaN payloads survive. Every slot of every named page is written.
#pragma once

#include "ops/pool_view.h"

namespace kvstrata::ops {

struct PackParams {
    const PageId* pages;    // [P], none negative
    int32_t n_pages;        // P
    int32_t head_dim;       // D
    void* k;                // [P, 16, D] contiguous, in the page's format (pack reads, unpack writes)
    void* v;                // [P, 16, D]
    const PoolView* pools;  // [8]
    int32_t threads = 1;
};

void pack(const PackParams& params);
void unpack(const PackParams& params);

}  // namespace kvstrata::ops
