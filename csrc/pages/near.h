// Near copies of a row's Far pages: a page cache of few slots, least recently used goes first.
//
// A copy belongs to the row, never to a page table: an entry names its Far page, and a slot may hold the same bytes nearer.
// Slots of entries that leave the row are free at once, so that a recycled page id never meets an old copy.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/types.h"
#include "pages/pool.h"

namespace kvstrata::pages {

struct NearSlot {
    PageId page;    // Near, the row's own
    int32_t entry;  // whose Far page it copies; -1: free
    int32_t stamp;  // step of its last use
};

// A Far page that has to be read: the entry's, into the Near page `to`.
struct Miss {
    int32_t entry;
    PageId to;
};

struct NearCopies {
    std::vector<NearSlot> slots;
    std::vector<int16_t> slot_of;  // [entries] of the row, -1: no copy; empty while there is no slot

    // The slot of an entry, or -1.
    int slot(int entry) const { return slot_of.empty() ? -1 : slot_of[entry]; }
    int64_t metadata_bytes() const {
        return static_cast<int64_t>(slots.capacity() * sizeof(NearSlot) + slot_of.capacity() * sizeof(int16_t));
    }

    void resize(int entries);             // with the row
    void move(int from, int to);          // an entry; what stood at `to` had left
    void leave(int entry);                // the entry leaves the row
    void release(Pools& pools);           // all of them
    void shrink(int most, Pools& pools);  // to so many slots: free ones go first, then the oldest
};

// Pages that admitting so many Far entries may take.
inline int64_t pages_needed(const NearCopies& near, int far_entries, int capacity) {
    const int64_t more = capacity - static_cast<int64_t>(near.slots.size());  // below 0 after a larger selection
    return more < 0 ? 0 : more < far_entries ? more : far_entries;
}

// Gives each of `entries` (Far ones, none twice, at most `capacity`) a slot: those that have one keep it; the others take free
// slots by index, then new ones from `pool` up to `capacity`, then those of the oldest stamp that are not asked for now, ties
// the lower slot. The misses are named in the order of `entries`; their bytes are the caller's to read.
void admit(NearCopies& near, int row_entries, std::span<const int32_t> entries, int capacity, int32_t step, Pool& pool,
           std::vector<Miss>& misses);

}  // namespace kvstrata::pages
