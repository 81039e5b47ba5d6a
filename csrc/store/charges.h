// Who holds what of a store's pages.
#pragma once

#include <cstdint>

#include "pages/pool.h"

namespace kvstrata::store {

// Pages of a pool in use that an owner took.
struct Charge {
    pages::Owner owner;
    int32_t pool;
    int64_t pages;
};

// Pages of a pool that a sequence holds with so many holders in all, itself one of them.
struct Holding {
    int32_t pool;
    uint32_t holders;
    int64_t pages;
};

}  // namespace kvstrata::store
