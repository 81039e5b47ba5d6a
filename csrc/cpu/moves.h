// How a list of moves is cut into work: where a page that is written to ends, because its slots share words.
#pragma once

#include "common/layout.h"
#include "cpu/parallel.h"
#include "ops/move.h"

namespace kvstrata::cpu {

inline constexpr int kMovesPerUnit = 128;  // at least

// First move of the unit that is wanted to begin at `wanted`: the first one into another page than the move before it.
inline int unit_start(const ops::Move* moves, int count, int wanted) {
    if (wanted <= 0) return 0;
    if (wanted >= count) return count;
    int before = wanted - 1;
    while (before >= 0 && ops::skipped(moves[before])) --before;
    if (before < 0) return wanted;
    int i = wanted;
    while (i < count && (ops::skipped(moves[i]) || moves[i].to == moves[before].to)) ++i;
    return i;
}

// Calls work(first, end) for parts of the list; no two parts write to one page.
template <class Work>
void each_part(const ops::Move* moves, int count, int threads, Work work) {
    const int units = (count + kMovesPerUnit - 1) / kMovesPerUnit;
    parallel(units, threads, [&](int64_t unit, int) {
        const int wanted = static_cast<int>(unit) * kMovesPerUnit;
        const int first = unit_start(moves, count, wanted), end = unit_start(moves, count, wanted + kMovesPerUnit);
        if (first < end) work(first, end);
    });
}

inline unsigned char* page_to(const PoolView* pools, PageId id) {
    return const_cast<unsigned char*>(page_at(pools, id));
}

// The token's position goes where the token goes, if both pools keep positions.
inline void move_position(const PoolView* pools, const ops::Move& move) {
    const auto slot = [&](PageId id, int32_t i) -> int32_t* {
        int32_t* const* slabs = pools[page_pool(id)].positions;
        int32_t* const slab = slabs ? slabs[page_slab(id)] : nullptr;
        return slab ? slab + page_index(id) * kSlots + i : nullptr;
    };
    int32_t* const to = slot(move.to, move.to_slot);
    const int32_t* const from = slot(move.from, move.from_slot);
    if (to && from) *to = *from;
}

}  // namespace kvstrata::cpu
