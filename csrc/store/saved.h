// A row as it is kept elsewhere.
#pragma once

#include <cstdint>
#include <span>

#include "common/types.h"
#include "pages/set.h"

namespace kvstrata::store {

// Its entries in order, and where their pages lie, one behind the other.
struct SavedRow {
    std::span<const int32_t> pool;
    std::span<const uint16_t> alive;
    std::span<const pages::SetTag> set;  // none, if rows are not tagged
    int32_t sealed;
    std::span<const PageId>
        page;  // that lie in a lent file already, else kNoPage: of these is the payload; none: of all
    const unsigned char* payload;
    int64_t payload_bytes;
    const int32_t* positions;  // [entries, 16]
    bool frozen;               // its centre, and the mean of that, if any
    std::span<const float> mean;

    bool lies(size_t entry) const { return !page.empty() && page[entry] != kNoPage; }
};

}  // namespace kvstrata::store
