// The kernels of attend: a block for few query rows, whose warps read different pages, and a team's.
#pragma once

#include "cuda/attend_finish.cuh"

namespace kvstrata::cuda {

// What a block does: a tile of the query rows of a row and a chunk of its list, or all of it.
struct Cut {
    int rows, first_row;       // of the row; of the block
    int first_query, queries;  // of the block
    int entries, begin, end;   // of the list without trailing -1; of the block
    int index;                 // of the chunk

    __device__ bool done() const { return first_row >= rows || (begin >= entries && index > 0); }
};

// Block x: chunk x / tiles of the list and tile x % tiles of the query rows of row y of the batch. All threads call it.
template <class S>
__device__ inline Cut cut_of(const AttendArgs& args, const ops::AttendRow& row) {
    Cut cut;
    cut.rows = row.queries * args.group;
    cut.index = static_cast<int>(blockIdx.x) / args.tiles;
    cut.first_row = static_cast<int>(blockIdx.x) % args.tiles * S::kRows;
    cut.first_query = cut.first_row / args.group;
    cut.queries = (min(cut.first_row + S::kRows, cut.rows) - 1) / args.group - cut.first_query + 1;
    cut.entries = count_entries(row);
    const int chunk = cut.rows <= kSplitRows ? chunk_of(cut.entries) : cut.entries;
    cut.begin = cut.index * chunk;
    cut.end = min(cut.begin + chunk, cut.entries);
    return cut;
}

// The logits that no page of the block will write: those of all its entries, and behind the last chunk those of trailing -1.
template <class S>
__device__ inline void clear_logits(const AttendArgs& args, const ops::AttendRow& row, const Cut& cut) {
    const int end = cut.end == cut.entries ? row.entries : cut.end;
    for (int n = cut.first_row; n < min(cut.rows, cut.first_row + S::kRows); ++n) {
        const int64_t line = static_cast<int64_t>(n % args.group) * row.queries + n / args.group;
        float* const to = row.logits + line * row.entries * kSlots;
        for (int i = cut.begin * kSlots + static_cast<int>(threadIdx.x); i < end * kSlots; i += S::kThreads)
            to[i] = -INFINITY;
    }
}

// A block's shared memory, and its query rows as a lane has them.
template <class S>
__device__ inline Place<S> place_of(const AttendArgs& args) {
    unsigned char* const operands = dynamic_shared() + block_bytes<S>();
    unsigned char* const rings = operands + operand_bytes(S::kRows, dim_of<S>(args));
    return {*reinterpret_cast<Block<S>*>(dynamic_shared()), operands, rings + (S::kTeam ? 0 : warp()) * args.ring_bytes,
            S::kTeam ? warp() * S::kWarpRows : 0};
}
template <class S>
__device__ inline void find_queries(LaneRows<S>& lanes, const AttendArgs& args, const Cut& cut, int warp_row) {
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q)
        lanes.query[q] = min(cut.first_row + warp_row + 4 * q + lane_b(), cut.rows - 1) / args.group - cut.first_query;
}

// Lists the block's entries of format F and reads them. Returns how many. All threads call it.
template <class S, Format F>
__device__ __forceinline__ int read_format(Sums<S>& sums, LaneRows<S>& lanes, const AttendArgs& args,
                                           const ops::AttendRow& row, const Place<S>& place, int first, bool prepared) {
    __syncthreads();  // all are done with the list, the operands and the rings
    if (warp() == 0) list_entries(place.block.entries, F);
    __syncthreads();
    const int count = place.block.entries.count;
    if (count) walk_list<S, F>(sums, lanes, args, row, place, first, prepared);
    return count;
}

// Leaves two parts of each chunk: of its quantized pages, rotated, and of its full ones.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) attend_few(const __grid_constant__ AttendArgs args) {
    const ListRow& list = args.batch.rows[blockIdx.y];
    const ops::AttendRow& row = list.row;
    if (static_cast<int>(blockIdx.x) % args.tiles * S::kRows >= row.queries * args.group) return;
    const Cut cut = cut_of<S>(args, row);
    if (cut.done()) return;
    const Place<S> place = place_of<S>(args);
    find_rows(place.block.rows, args, row, cut.first_row);
    if (row.logits) clear_logits<S>(args, row, cut);
    fill_entries(place.block.entries, args, row, cut.begin, cut.end - cut.begin, cut.entries, cut.first_query,
                 cut.queries);
    LaneRows<S> lanes;
    find_queries(lanes, args, cut, 0);
    Sums<S> sums;
    int read = 0;
    const auto visit = [&]<Format F>() {
        if (args.formats >> static_cast<int>(F) & 1)
            read += read_format<S, F>(sums, lanes, args, row, place, cut.begin, false);
    };
    const auto finish = [&](int kind) {
        const Partials partials = partials_of(cut.rows, row.entries, dim_of<S>(args));
        float* const workspace = args.workspace + list.partials;
        if (threadIdx.x == 0) workspace[0] = __int_as_float(chunks_of(cut.entries));
        __syncthreads();
        if (read) {
            join_walkers(sums, args, place, workspace, partials, 2 * cut.index + kind, cut.first_row);
        } else {
            write_nothing<S>(workspace, partials, 2 * cut.index + kind, cut.first_row);
        }
        read = 0;
    };
    clear(sums);
    visit.template operator()<Format::int8>();
    visit.template operator()<Format::int4>();
    visit.template operator()<Format::int2>();
    finish(0);
    clear(sums);
    visit.template operator()<Format::f32>();
    visit.template operator()<Format::bf16>();
    visit.template operator()<Format::f16>();
    finish(1);
}

// Leaves one part of each chunk, or, where the list is not cut, results.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) attend_team(const __grid_constant__ AttendArgs args) {
    const ListRow& list = args.batch.rows[blockIdx.y];
    const ops::AttendRow& row = list.row;
    if (static_cast<int>(blockIdx.x) % args.tiles * S::kRows >= row.queries * args.group) return;
    const Cut cut = cut_of<S>(args, row);
    if (cut.done()) return;
    const Place<S> place = place_of<S>(args);
    const int warp_row = cut.first_row + place.first_row;
    find_rows(place.block.rows, args, row, cut.first_row);
    if (row.logits) clear_logits<S>(args, row, cut);
    LaneRows<S> lanes;
    find_queries(lanes, args, cut, place.first_row);
    Sums<S> sums;
    clear(sums);
    int filled = -1, read = 0;  // the entries that the block knows; pages that were read
    const auto visit = [&]<Format F>() {
        if (!(args.formats >> static_cast<int>(F) & 1)) return;
        bool prepared = false;
        for (int first = cut.begin; first < cut.end; first += kMaxChunk) {
            __syncthreads();
            if (filled != first)
                fill_entries(place.block.entries, args, row, first, min(kMaxChunk, cut.end - first), cut.entries,
                             cut.first_query, cut.queries);
            filled = first;
            const int count = read_format<S, F>(sums, lanes, args, row, place, first, prepared);
            prepared = prepared || count;
            read += count;
        }
    };
    visit.template operator()<Format::int8>();
    visit.template operator()<Format::int4>();
    visit.template operator()<Format::int2>();
    __syncthreads();
    if (read) rotate_back(sums, args, reinterpret_cast<float*>(place.ring) + warp() * 4 * dim_of<S>(args));
    visit.template operator()<Format::f32>();
    visit.template operator()<Format::bf16>();
    visit.template operator()<Format::f16>();
    if (cut.rows > kSplitRows) {
        write_results(sums, args, row, warp_row);
    } else {
        float* const workspace = args.workspace + list.partials;
        const Partials partials = partials_of(cut.rows, row.entries, dim_of<S>(args));
        if (threadIdx.x == 0) workspace[0] = __int_as_float(chunks_of(cut.entries));
        write_partial(sums, workspace, partials, cut.index, warp_row);
    }
}

}  // namespace kvstrata::cuda
