// What a policy sees of a store, and the plans that it gives back.
#pragma once

#include <cstdint>
#include <vector>

#include "common/types.h"
#include "pages/set.h"
#include "store/repack.h"

namespace kvstrata::store {

// Outputs of look, each null or [R, N]: positions (-1 beyond a row's last token), in the open tail, State, score.
struct Look {
    int32_t* positions;
    uint8_t* open;
    uint8_t* state;
    float* scores;
    uint8_t* tier;     // Tier
    uint8_t* grouped;  // its page was put together by a plan's groups: 1 for the time being, 2 for good
    int32_t* entry;    // of its page in the table
};

// What the rows of a layer hold: slots by State, and page-table entries.
struct Tally {
    int64_t slots[kStates] = {};
    int64_t entries = 0, far = 0;  // entries; slots of the Far tier
};

// What one call of apply_plan can do: `entries` of the `changing` pages of a row, into so many new pages of each pool, of which
// no more than `spare` bytes are not free yet, by `cost`, and no more than `room` bytes are Near.
struct PlanPiece {
    int32_t entries, changing;
    std::vector<int64_t> pages;
};

// Sealed tokens that no plan has grouped for good, and those of them that none has grouped at all: the most that a row has.
struct Waiting {
    int64_t tokens = 0, fresh = 0;
};

// Columns of a plan, each [R, columns] or, but for the state, null.
struct PlanColumns {
    const uint8_t* state;
    const uint8_t* tier;
    const int32_t* group;
    int64_t columns;
    const pages::SetTag* set = nullptr;

    RowPlan row(int64_t r) const {
        return {state + r * columns, tier ? tier + r * columns : nullptr, group ? group + r * columns : nullptr,
                set ? set + r * columns : nullptr};
    }
};

}  // namespace kvstrata::store
