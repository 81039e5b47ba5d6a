#include "cpu/attend_masks.h"

namespace kvstrata::cpu {
namespace {

int count_bits(uint16_t mask) { return __builtin_popcount(mask); }

// The lowest n set bits of a mask.
uint16_t lowest(uint16_t mask, int n) {
    uint16_t rest = mask;
    for (; n > 0 && rest; --n) rest = static_cast<uint16_t>(rest & (rest - 1));
    return mask & static_cast<uint16_t>(~rest);
}

}  // namespace

MaskWalk::MaskWalk(const ops::AttendParams& params, const ops::AttendRow& row, int first, int count, int entry)
    : params_(params), row_(row), first_(first), count_(count), own_entry_(row.entries) {
    int seen = 0;
    while (own_entry_ > 0 && seen < row.own) seen += count_bits(visible_slots(row, --own_entry_));
    own_skip_ = seen - row.own;
    for (int e = own_entry_; e < entry; ++e) {
        own_next_ += count_bits(visible_slots(row, e)) - (e == own_entry_ ? own_skip_ : 0);
    }
}

uint16_t MaskWalk::own_mask(int query, uint16_t own) const {
    if (!row_.tree) return lowest(own, query + 1 - own_next_);
    uint16_t mask = 0;
    int token = own_next_;
    for (uint16_t rest = own; rest; rest = static_cast<uint16_t>(rest & (rest - 1)), ++token) {
        const uint16_t slot = static_cast<uint16_t>(rest & -rest);
        if (row_.tree[query] >> token & 1) mask |= slot;
    }
    return mask;
}

uint16_t MaskWalk::window_mask(int query, const int32_t* positions) const {
    const int64_t oldest = static_cast<int64_t>(row_.q_pos[query]) - params_.window;  // this one is out already
    unsigned mask = 0;
    for (int i = 0; i < kSlots; ++i) mask |= static_cast<unsigned>(positions[i] > oldest) << i;
    return static_cast<uint16_t>(mask);
}

uint16_t MaskWalk::next(int entry, uint16_t* masks) {
    const uint16_t visible = visible_slots(row_, entry);
    if (!visible) {
        for (int i = 0; i < count_; ++i) masks[i] = 0;
        return 0;
    }
    const uint16_t plain = entry < own_entry_    ? visible
                           : entry == own_entry_ ? lowest(visible, own_skip_)
                                                 : uint16_t{0};
    const uint16_t own = visible & static_cast<uint16_t>(~plain);
    const int32_t* positions = nullptr;
    if (params_.window) {
        const PageId id = row_.pages[entry];
        positions = params_.pools[page_pool(id)].positions[page_slab(id)] + page_index(id) * kSlots;
    }
    uint16_t any = 0;
    for (int i = 0; i < count_; ++i) {
        masks[i] = own ? plain | own_mask(first_ + i, own) : plain;
        if (positions && masks[i]) masks[i] &= window_mask(first_ + i, positions);
        any |= masks[i];
    }
    own_next_ += count_bits(own);
    return any;
}

}  // namespace kvstrata::cpu
