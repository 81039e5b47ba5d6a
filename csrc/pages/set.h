// Sets: which episode a page belongs to, and which of them a question sees.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kvstrata::pages {

using SetTag = uint16_t;  // kBackbone, a private set 1..kMaxSet, or kPending

inline constexpr SetTag kBackbone = 0;
inline constexpr SetTag kPending = 0xFFFF;     // no plan has given the page to a set
inline constexpr SetTag kLesserHalf = 0x8000;  // of a private set: read where that set is read alone
inline constexpr SetTag kMaxSet = kLesserHalf - 1;

inline SetTag set_of(SetTag tag) { return tag == kPending ? tag : tag & static_cast<SetTag>(~kLesserHalf); }

// Backbone and pending pages are in every view, private ones if their set is named.
struct View {
    bool all = true;           // every set, whole
    bool halves = false;       // of the sets named, the better halves
    std::vector<SetTag> sets;  // that are read, if not all are

    bool shows(SetTag tag) const {
        if (all || tag == kPending || tag == kBackbone) return true;
        return !(halves && tag & kLesserHalf) && std::find(sets.begin(), sets.end(), set_of(tag)) != sets.end();
    }
};

}  // namespace kvstrata::pages
