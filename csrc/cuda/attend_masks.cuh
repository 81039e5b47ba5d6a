// Which slots of each entry the queries of a block of threads may read: visible, not a later own token, inside the window. The
// only place of attend's masks.
#pragma once

#include "cuda/attend_shape.cuh"

namespace kvstrata::cuda {

// Up to kMaxChunk entries, in shared memory. Entries that no query reads have no page.
template <class S>
struct Entries {
    const unsigned char* pages[kMaxChunk];
    uint16_t masks[kMaxChunk][S::kRows];  // of the queries of the block's rows
    uint16_t visible[kMaxChunk];
    uint16_t any[kMaxChunk];   // the union of the masks
    uint8_t alike[kMaxChunk];  // all masks are the same
    uint8_t format[kMaxChunk];
    uint8_t list[kMaxChunk];  // those of one format
    int32_t count;            // of the list
};

__device__ inline uint16_t visible_slots(const ops::AttendRow& row, int entry) {
    if (row.pages[entry] < 0) return 0;
    return row.visible ? row.visible[entry] : kAllSlots;
}

namespace {

// Entries of a row without its trailing -1. All threads call it and get it.
__device__ int count_entries(const ops::AttendRow& row) {
    constexpr int kEach = 8;  // entries of a thread at a time: reads that do not wait for each other
    __shared__ int last[kWarp];
    int end = row.entries;
    while (end > 0 && row.pages[end - 1] < 0) {
        int found = 0;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const int e = end - 1 - static_cast<int>(j * blockDim.x + threadIdx.x);
            if (e >= 0 && row.pages[e] >= 0 && e >= found) found = e + 1;
        }
        found = __reduce_max_sync(kAllLanes, found);
        if (lane() == 0) last[warp()] = found;
        __syncthreads();
        found = __reduce_max_sync(kAllLanes, lane() < warps() ? last[lane()] : 0);
        __syncthreads();
        end = found ? found : end - kEach * static_cast<int>(blockDim.x);
    }
    return end > 0 ? end : 0;
}

}  // namespace

// Visible slots of the entries from `from` on, at least, if it is less than `enough`. All lanes of a warp call it.
__device__ inline int count_visible(const ops::AttendRow& row, int from, int entries, int enough) {
    int seen = 0;
    for (int end = entries; end > from && seen < enough; end -= kWarp) {
        const int e = end - 1 - lane();
        seen += __reduce_add_sync(kAllLanes, e >= from ? __popc(visible_slots(row, e)) : 0);
    }
    return seen;
}

// Of an entry's visible slots those that query t may read as far as own tokens go; the first of them is own token `token`, where
// negative ones are earlier tokens.
__device__ inline uint16_t without_later(const ops::AttendRow& row, uint16_t visible, int token, int t) {
    if (token + __popc(visible) <= 0) return visible;
    unsigned mask = 0;
    for (unsigned rest = visible; rest; rest &= rest - 1, ++token) {
        const bool read = token < 0 || (row.tree ? (row.tree[t] >> token & 1) != 0 : token <= t);
        if (read) mask |= rest & (0u - rest);
    }
    return static_cast<uint16_t>(mask);
}

// Takes away the slots that are out of the window. A half warp reads the positions of an entry.
template <class S>
__device__ inline void apply_window(Entries<S>& to, const AttendArgs& args, const ops::AttendRow& row, int first,
                                    int count, int first_query, int queries) {
    for (int i = 2 * warp() + lane() / kSlots; i / 2 * 2 < count; i += 2 * S::kWarps) {
        const int slot = lane() % kSlots;
        const bool there = i < count && to.visible[i] >> slot & 1;
        const int position = there ? positions_at(args.pools, row.pages[first + i])[slot] : 0;
        for (int q = 0; q < queries; ++q) {
            const int64_t oldest = static_cast<int64_t>(row.q_pos[first_query + q]) - args.window;  // is out already
            const unsigned inside = __ballot_sync(kAllLanes, there && position > oldest) >> (lane() & kSlots);
            if (slot == 0 && i < count) to.masks[i][q] &= static_cast<uint16_t>(inside);
        }
    }
}

// Entries [first, first + count) of a row of `entries`, for queries [first_query, first_query + queries). All threads call it.
template <class S>
__device__ inline void fill_entries(Entries<S>& to, const AttendArgs& args, const ops::AttendRow& row, int first,
                                    int count, int entries, int first_query, int queries) {
    const int i = static_cast<int>(threadIdx.x);  // of a block of at least kMaxChunk threads
    if (i < kMaxChunk) to.visible[i] = i < count ? visible_slots(row, first + i) : 0;
    const int own = row.tree || row.own > 1 ? row.own : 0;  // a single one is read by every query
    const int after = own ? count_visible(row, first + count, entries, own) : 0;
    __syncthreads();
    for (int j = i; j < kMaxChunk * queries; j += S::kThreads) {
        const int entry = j / queries, q = j % queries;
        uint16_t mask = to.visible[entry];
        if (own && after < own) {
            int seen = after;
            for (int later = entry; later < count; ++later) seen += __popc(to.visible[later]);
            mask = without_later(row, mask, own - seen, first_query + q);
        }
        to.masks[entry][q] = mask;
    }
    __syncthreads();
    if (args.window) {
        apply_window(to, args, row, first, count, first_query, queries);
        __syncthreads();
    }
    if (i >= kMaxChunk) return;
    unsigned any = 0, differ = 0;
    for (int q = 0; q < queries; ++q) {
        any |= to.masks[i][q];
        differ |= to.masks[i][q] ^ to.masks[i][0];
    }
    to.any[i] = static_cast<uint16_t>(any);
    to.alike[i] = !differ;
    if (!any) return;
    const PageId id = row.pages[first + i];
    to.pages[i] = page_at(args.pools, id);
    to.format[i] = static_cast<uint8_t>(format_at(args.pools, id));
}

// Lists the entries of one format that some query reads, in order. The first warp calls it.
template <class S>
__device__ inline void list_entries(Entries<S>& in, Format format) {
    int count = 0;
#pragma unroll
    for (int half = 0; half < kMaxChunk; half += kWarp) {
        const int i = half + lane();
        const bool wanted = in.any[i] && in.format[i] == static_cast<uint8_t>(format);
        const unsigned all = __ballot_sync(kAllLanes, wanted);
        if (wanted) in.list[count + __popc(all & ((1u << lane()) - 1))] = static_cast<uint8_t>(i);
        count += __popc(all);
    }
    if (lane() == 0) in.count = count;
}

}  // namespace kvstrata::cuda
