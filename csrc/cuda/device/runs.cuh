// A list of moves cut among blocks: the moves into one page follow each other and belong to one block, the one whose
// part of the list they begin in. So no word of a page has two writers, and a page's lines are written whole.
//
// A block that begins inside a page's moves reads back to the move before its part. A part is 16 moves: a block gets
// about one page, and what it reads of the list is about its part, however the pages lie in it. Only stretches of skipped
// moves beside a page that is not full make it read more, 32 moves at a time.
#pragma once

#include "cuda/device/page.cuh"
#include "cuda/device/warp.cuh"
#include "ops/move.h"

namespace kvstrata::cuda {

inline constexpr int kPart = kSlots;  // moves of a block's part of the list
static_assert(kPart <= kWarp, "a part is looked at by one warp at once");

// The moves of one page. In shared memory.
struct Run {
    PageId page;         // kNoPage: no other page begins in the part
    uint32_t slots;      // bit i: a move to slot i
    int32_t next;        // where the list goes on
    int32_t at[kSlots];  // index of the move to a slot; what is not named in slots is not written
};

struct MoveList {
    const ops::Move* moves;
    int32_t count;

    __device__ PageId page(int i) const { return skipped(moves[i]) ? kNoPage : moves[i].to; }
    __device__ int slot(int i) const { return moves[i].to_slot; }
};

// Where a slot's position lies, or null where the pool keeps none.
__device__ inline int32_t* position_of(const Pools& pools, PageId id, int slot) {
    int32_t* const* const slabs = pools.at[page_pool(id)].positions;
    int32_t* const slab = slabs ? slabs[page_slab(id)] : nullptr;
    return slab ? slab + page_index(id) * kSlots + slot : nullptr;
}

// Where the tokens of a run come from, by the slots that they go to. In shared memory.
struct Sources {
    const unsigned char* page[kSlots];  // of slots that are named
    int32_t slot[kSlots];
    Format format[kSlots];
};

// Fills it, and moves the tokens' positions, if both pools keep them. The threads of one warp at least; a barrier follows.
__device__ inline void find_sources(const Pools& pools, const ops::Move* moves, const Run& run, Sources& from) {
    const int slot = static_cast<int>(threadIdx.x);
    if (slot >= kSlots || !(run.slots >> slot & 1)) return;
    const ops::Move move = moves[run.at[slot]];
    from.page[slot] = page_at(pools, move.from);
    from.slot[slot] = move.from_slot;
    from.format[slot] = format_at(pools, move.from);
    int32_t* const to = position_of(pools, run.page, slot);
    const int32_t* const position = position_of(pools, move.from, move.from_slot);
    if (to && position) *to = *position;
}

// The page of the last move before the part at `first`, skipped ones aside; kNoPage where the part has no move to ask for.
// One warp.
template <class List>
__device__ PageId page_before(const List& list, int first) {
    const auto page = [&](int i) { return i >= 0 && i < list.count ? list.page(i) : kNoPage; };
    const PageId own = lane() < kPart ? page(first + lane()) : kNoPage;
    PageId before = page(first - kWarp + lane());
    if (!__any_sync(kAllLanes, own >= 0)) return kNoPage;
    for (int end = first; end > 0; before = page(end - kWarp + lane())) {
        const unsigned named = __ballot_sync(kAllLanes, before >= 0);
        if (named) return __shfl_sync(kAllLanes, before, kWarp - 1 - __clz(static_cast<int>(named)));
        end -= kWarp;
    }
    return kNoPage;
}

// Finds the next page whose moves begin in [at, end) and all its moves; those of page `taken` are another block's. One
// warp.
template <class List>
__device__ void find_run(const List& list, int at, int end, PageId taken, Run& run) {
    PageId page = kNoPage;
    unsigned slots = 0;
    while (at < list.count && slots != kAllSlots) {
        const int i = at + lane();
        const bool listed = i < list.count;
        PageId id = listed ? list.page(i) : kNoPage;
        const int slot = listed ? list.slot(i) : 0;  // asked for together: what is skipped may hold anything
        if (id == taken) id = kNoPage;
        if (page < 0) {
            const unsigned begins = __ballot_sync(kAllLanes, id >= 0 && i < end);
            if (!begins) break;
            page = __shfl_sync(kAllLanes, id, __ffs(static_cast<int>(begins)) - 1);
        }
        if (id == page) run.at[slot] = i;
        slots |= __reduce_or_sync(kAllLanes, id == page ? 1u << slot : 0u);
        const unsigned others = __ballot_sync(kAllLanes, id >= 0 && id != page);
        at += others ? __ffs(static_cast<int>(others)) - 1 : kWarp;
        if (others) break;
    }
    if (lane() == 0) run.page = page, run.slots = slots, run.next = at;
}

// Calls work() of the whole block for each page whose moves begin in [first, first + kPart), its moves in `run`.
template <class List, class Work>
__device__ void each_run(const List& list, int first, Run& run, Work work) {
    const int end = first + kPart;
    PageId taken = kNoPage;
    if (warp() == 0) taken = page_before(list, first);
    for (int at = first; at < end; at = run.next) {
        __syncthreads();  // the run before is done with
        if (warp() == 0) find_run(list, at, end, taken, run);
        __syncthreads();
        if (run.page < 0) return;
        work();
    }
}

}  // namespace kvstrata::cuda
