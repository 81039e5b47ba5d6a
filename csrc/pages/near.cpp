#include "pages/near.h"

#include <algorithm>
#include <cassert>

namespace kvstrata::pages {

void NearCopies::resize(int entries) {
    if (!slot_of.empty()) slot_of.resize(entries, -1);
}

void NearCopies::move(int from, int to) {
    if (slot_of.empty()) return;
    slot_of[to] = slot_of[from];
    if (slot_of[to] >= 0) slots[slot_of[to]].entry = to;
    if (from != to) slot_of[from] = -1;
}

void NearCopies::leave(int entry) {
    const int at = slot(entry);
    if (at < 0) return;
    slots[at].entry = -1;
    slot_of[entry] = -1;
}

void NearCopies::release(Pools& pools) {
    for (const NearSlot& s : slots) pool_of(pools, s.page).release(s.page);
    slots.clear();
    slot_of.clear();
}

void NearCopies::shrink(int most, Pools& pools) {
    while (static_cast<int>(slots.size()) > most) {
        const auto sooner = [](const NearSlot& a, const NearSlot& b) {
            return (a.entry < 0) != (b.entry < 0) ? a.entry < 0 : a.stamp < b.stamp;
        };
        const auto least = std::min_element(slots.begin(), slots.end(), sooner);
        pool_of(pools, least->page).release(least->page);
        if (least->entry >= 0) slot_of[least->entry] = -1;
        *least = slots.back();
        slots.pop_back();
        if (least != slots.end() && least->entry >= 0)
            slot_of[least->entry] = static_cast<int16_t>(least - slots.begin());
    }
}

namespace {

// A free slot, a new one, or the one that was used longest ago, before `step`.
int place(NearCopies& near, int capacity, int32_t step, Pool& pool) {
    int oldest = -1;
    for (int i = 0; i < static_cast<int>(near.slots.size()); ++i) {
        const NearSlot& s = near.slots[i];
        if (s.entry < 0) return i;
        if (s.stamp != step && (oldest < 0 || s.stamp < near.slots[oldest].stamp)) oldest = i;
    }
    if (static_cast<int>(near.slots.size()) < capacity) {
        near.slots.push_back({pool.take(kCache), -1, step});
        return static_cast<int>(near.slots.size()) - 1;
    }
    assert(oldest >= 0);
    near.slot_of[near.slots[oldest].entry] = -1;
    return oldest;
}

}  // namespace

void admit(NearCopies& near, int row_entries, std::span<const int32_t> entries, int capacity, int32_t step, Pool& pool,
           std::vector<Miss>& misses) {
    if (near.slot_of.empty()) near.slot_of.assign(row_entries, -1);
    for (int32_t e : entries) {
        if (near.slot_of[e] >= 0) near.slots[near.slot_of[e]].stamp = step;
    }
    for (int32_t e : entries) {
        if (near.slot_of[e] >= 0) continue;
        const int at = place(near, capacity, step, pool);
        near.slots[at].entry = e;
        near.slots[at].stamp = step;
        near.slot_of[e] = static_cast<int16_t>(at);
        misses.push_back({e, near.slots[at].page});
    }
}

}  // namespace kvstrata::pages
