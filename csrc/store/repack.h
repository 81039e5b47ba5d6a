// What a plan comes to for one row: entries that leave or narrow, and survivors to pack into new pages.
//
// Survivors of touched pages are packed by (tier, format, set, group, position). A page is touched if one of its tokens changes
// state, tier or page, or not all of them are of one set: a page that goes to a set whole stays as it is; or if it is part-filled and ungrouped and others of its kind are packed anyway: so a row never holds
// two part-filled ungrouped sealed pages of one format after a plan that moves anything. Evicted tokens of a Far page only
// lose their slots: its other tokens stay where they are. So do those of `fixed` first entries: sinks that are read whatever is
// selected, by their place.
#pragma once

#include <cstdint>
#include <vector>

#include "common/types.h"
#include "pages/row.h"

namespace kvstrata::store {

inline constexpr int kStates = 5, kTiers = 2;

// A row's plan, each column [N] in table order.
struct RowPlan {
    const uint8_t* state;
    const uint8_t* tier;                 // Tier, or null: as it is
    const int32_t* group;                // tokens of one number share pages; -1: as it is; or null
    const pages::SetTag* set = nullptr;  // of its page; or null: as it is

    bool whole() const { return tier || group; }  // it is applied in one piece
};

inline constexpr int32_t kProvisionalGroup =
    1 << 30;  // groups from this number on: a later plan will put them together anew

// What a page is: how and where it stores its tokens.
struct Kind {
    State state;
    Tier tier;
    bool operator==(const Kind&) const = default;
};

struct Survivor {
    pages::SetTag set;
    int32_t group, position;
    PageId page;
    int32_t slot;
    State now;
    uint32_t note;
};

// A new page: survivors [first, first + count) of its kind.
struct NewPage {
    int32_t first, count;
    uint8_t want;  // kGrouped, kProvisional or 0
    pages::SetTag set;
};

struct Repack {
    std::vector<uint16_t> keep;                 // [entries] slots that stay where they are
    std::vector<Survivor> to[kTiers][kStates];  // in the order in which they are packed
    std::vector<NewPage> pages[kTiers][kStates];
    std::vector<pages::SetTag> tag;  // [entries] of the pages that stay, or empty if the row is not tagged
    std::vector<int32_t> first;      // [entries + 1] of each entry's tokens among the columns
    int changing = 0;                // sealed entries that the whole plan rewrites
    bool changes = false;

    bool gone(int entry) const { return keep[entry] == 0; }
};

// A piece of at most `most` rewritten entries: of more, those of fewest survivors. kinds [pools]: of their pages.
Repack repack(const pages::Row& row, const RowPlan& plan, int most, int fixed, pages::Pools& pools, const Kind* kinds);

// The new states in the order in which the row's table stands once the piece is done.
std::vector<uint8_t> reordered(const pages::Row& row, const RowPlan& plan, const Repack& piece);

}  // namespace kvstrata::store
