// What an op sees of the pools: where the pages lie and where their slots' positions lie. Owns nothing.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata {

struct PoolView {
    Format format;
    int32_t n_slabs;
    int64_t stride;               // bytes from one page to the next inside a slab, a multiple of 64
    unsigned char* const* slabs;  // [n_slabs]  first page of each slab, 64-byte aligned
    int32_t* const* positions;    // [n_slabs] -> i32 [pages of the slab, 16]; only read where a window asks for it
};

inline const unsigned char* page_at(const PoolView* pools, PageId id) {
    const PoolView& pool = pools[page_pool(id)];
    return pool.slabs[page_slab(id)] + page_index(id) * pool.stride;
}

}  // namespace kvstrata
