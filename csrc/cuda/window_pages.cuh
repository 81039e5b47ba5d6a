// The pages of a unit of window queries: those of its entries with slots that some query may read, in pairs of one format.
#pragma once

#include "cuda/device/copy.cuh"
#include "cuda/window.cuh"

namespace kvstrata::cuda {

inline constexpr int kLine = 128;  // bytes that are fetched together

// Two pages, in shared memory. Where a format has an odd number of them, its last page stands for both, without slots.
struct PagePair {
    const unsigned char* page[kPair];
    const int32_t* positions[kPair];  // null: no slot needs a look at its position
    int32_t entry[kPair];             // of the unit; -1: none
    uint16_t slots[kPair];
    Format format;
    int16_t group;  // dims that share a scale
};

struct UnitPages {
    PagePair pairs[kUnitEntries / kPair + 3];  // six formats may be odd
    int32_t count;
    uint32_t found;  // bit i: entry i of the unit has a pair
    int32_t slots;   // of all of them
};

// Positions of a row's queries.
struct QuerySpan {
    int32_t oldest, newest;
};

// All lanes of a warp. Without positions: every slot is earlier.
__device__ inline QuerySpan span_of(const ops::WindowRow& row) {
    int oldest = INT32_MAX, newest = INT32_MIN;
    for (int t = lane(); row.q_pos && t < row.queries; t += kWarp) {
        oldest = min(oldest, row.q_pos[t]);
        newest = max(newest, row.q_pos[t]);
    }
    return {__reduce_min_sync(kAllLanes, oldest), __reduce_max_sync(kAllLanes, newest)};
}

// What a lane finds of its entry.
struct EntrySlots {
    uint32_t slots;   // that count
    bool positioned;  // some query may have to leave out some of them
};

// Slots of an entry that are visible and count, with their page's positions.
__device__ inline EntrySlots look_at(const int32_t* positions, uint32_t visible, QuerySpan span, Past past,
                                     int32_t window) {
    int oldest = INT32_MAX, newest = INT32_MIN;
    uint32_t slots = 0;
#pragma unroll
    for (int i = 0; i < kSlots; i += 4) {
        const int4 four = __ldg(reinterpret_cast<const int4*>(positions + i));
        const int at[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const bool counts = visible >> (i + j) & 1 && (!past.only || (at[j] >= past.skip && at[j] < span.oldest));
            if (!counts) continue;
            slots |= 1u << (i + j);
            oldest = min(oldest, at[j]), newest = max(newest, at[j]);
        }
    }
    const bool all_read =
        newest <= span.oldest && (!window || static_cast<int64_t>(span.newest) - oldest < static_cast<int64_t>(window));
    return {oldest > span.newest ? 0 : slots, !all_read};
}

// Fills `pages` for a chunk of a row. All lanes of one warp; the others see it after a barrier.
__device__ inline void find_pages(UnitPages& pages, const Pools& pools, const ops::WindowRow& row, int head_dim,
                                  int chunk, Past past, int32_t window) {
    const QuerySpan span = span_of(row);
    const int entry = chunk * kUnitEntries + lane();
    const PageId id = row.queries && entry < row.entries ? row.pages[entry] : kNoPage;
    const uint32_t visible = id < 0 ? 0 : row.visible ? row.visible[entry] : kAllSlots;
    EntrySlots mine{visible, false};
    const int32_t* positions = nullptr;
    Format format = Format::f32;
    if (visible) {
        format = format_at(pools, id);
        if (row.q_pos) {
            positions = positions_at(pools, id);
            mine = look_at(positions, visible, span, past, window);
        }
    }
    pages.found = __ballot_sync(kAllLanes, mine.slots != 0);
    pages.slots = __reduce_add_sync(kAllLanes, __popc(mine.slots));
    int count = 0;
    for (int f = 0; f <= static_cast<int>(Format::int2); ++f) {
        const bool of_format = mine.slots && static_cast<int>(format) == f;
        const uint32_t members = __ballot_sync(kAllLanes, of_format);
        const int n = __popc(members), rank = __popc(members & ((1u << lane()) - 1));
        if (of_format) {
            PagePair& pair = pages.pairs[count + rank / kPair];
            const bool alone = rank == n - 1 && rank % kPair == 0;
            for (int i = rank % kPair; i <= (alone ? 1 : rank % kPair); ++i) {
                const bool own = i == rank % kPair;
                pair.page[i] = page_at(pools, id);
                pair.positions[i] = mine.positioned ? positions : nullptr;
                pair.entry[i] = own ? lane() : -1;
                pair.slots[i] = static_cast<uint16_t>(own ? mine.slots : 0);
            }
            pair.format = format;
            pair.group = static_cast<int16_t>(is_full(format) ? head_dim : group_size(format, head_dim));
        }
        count += (n + kPair - 1) / kPair;
    }
    pages.count = count;
    __syncwarp();
}

// Brings the keys of a pair to L2, so that its warp does not wait for memory when it comes to it. All lanes of a warp.
__device__ inline void fetch_ahead(const UnitPages& pages, int pair, int head_dim) {
    if (pair >= pages.count) return;
    const PagePair& next = pages.pairs[pair];
    const int64_t keys = half_bytes(next.format, head_dim), scales = scale_bytes(next.format, head_dim);
    for (const unsigned char* page : next.page) {
        for (int64_t at = lane() * kLine; at < keys; at += kWarp * kLine) prefetch_to_l2(page + at);
        if (lane() * kLine < scales) prefetch_to_l2(page + 2 * keys + lane() * kLine);
    }
}

// Zeros for the entries of a chunk that have no pair, `count` of them, of some heads: out [G, count, 16] from the chunk's first
// on. The whole block.
__device__ inline void clear_others(const UnitPages& pages, int count, int head, int end_head, int64_t stride_g,
                                    float* out) {
    for (int g = head; g < end_head; ++g) {
        for (int i = static_cast<int>(threadIdx.x); i < count * kSlots; i += static_cast<int>(blockDim.x)) {
            if (!(pages.found >> i / kSlots & 1)) out[g * stride_g + i] = 0.0f;
        }
    }
}

}  // namespace kvstrata::cuda
