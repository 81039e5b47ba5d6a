// What the border of every op checks alike.
#pragma once

#include "common/check.h"
#include "ops/pool_view.h"
#include "ops/settings.h"
#include "ops/supported.h"

namespace kvstrata::ops {

// Whether page ids are checked too: on request, and where they can be read here.
inline bool checks_ids(const Where& where) { return settings().check && where.on_host(); }

inline void check_shape(const char* op, int head_dim, int group = 1) {
    if (head_dim < 1 || head_dim > kMaxHeadDim) {
        throw Unsupported(message(op, ": head_dim is ", head_dim, ", expected 1 to ", kMaxHeadDim));
    }
    if (group < 1 || group > kMaxGroup) {
        throw Unsupported(message(op, ": group is ", group, " query heads per KV head, expected 1 to ", kMaxGroup));
    }
}

inline void check_float(const char* op, const char* argument, DType type) {
    check(is_float(type), op, ": ", argument, " has dtype ", name(type), ", expected f32, bf16 or f16");
}

inline void check_quantizable(const char* op, int head_dim) {
    if (!quantizable(head_dim)) {
        throw Unsupported(message(op, ": head_dim is ", head_dim, ", expected a multiple of 16 in ", kMinQuantizedDim,
                                  " to ", kMaxHeadDim));
    }
}

// If checks_ids: an id that the pools do not hold.
inline const PoolView& check_page(const char* op, const PoolView* pools, PageId id, int row, int entry) {
    const PoolView* pool = id >= 0 && page_pool(id) < kMaxPools ? &pools[page_pool(id)] : nullptr;
    check(pool && page_slab(id) < pool->n_slabs, op, ": pages[", row, ", ", entry, "] is ", id,
          ", expected a page of a pool");
    return *pool;
}

}  // namespace kvstrata::ops
