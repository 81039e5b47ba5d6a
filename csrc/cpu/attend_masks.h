// Which slots of a page each query may read: visible, not a later own token, inside the window.
#pragma once

#include "ops/attend.h"

namespace kvstrata::cpu {

inline uint16_t visible_slots(const ops::AttendRow& row, int entry) {
    if (row.pages[entry] < 0) return 0;
    return row.visible ? row.visible[entry] : kAllSlots;
}

// Walks a row's entries in ascending order and gives the masks of queries [first, first + count) at each.
class MaskWalk {
  public:
    MaskWalk(const ops::AttendParams& params, const ops::AttendRow& row, int first, int count, int entry);

    // masks[i] of query first + i at `entry`, which must be the next entry of the walk. Returns the union.
    uint16_t next(int entry, uint16_t* masks);

  private:
    uint16_t own_mask(int query, uint16_t own) const;
    uint16_t window_mask(int query, const int32_t* positions) const;

    const ops::AttendParams& params_;
    const ops::AttendRow& row_;
    int first_, count_;
    int own_entry_;     // first entry that holds own tokens; row.entries if none
    int own_skip_ = 0;  // visible slots of that entry that are not own
    int own_next_ = 0;  // own token that the next own slot holds
};

}  // namespace kvstrata::cpu
