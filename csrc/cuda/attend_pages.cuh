// The kernel of attend, and its launch for one class of head dims.
#pragma once

#include "cuda/attend_finish.cuh"

namespace kvstrata::cuda {

// The logits that no page of the block's chunk will write: all of its entries', and behind the last chunk those of trailing -1.
template <class S>
__device__ inline void clear_logits(const AttendArgs& args, const ops::AttendRow& row, int first_row, int begin,
                                    int end) {
    const int rows = row.queries * args.group;
    for (int n = first_row; n < min(rows, first_row + S::kRows); ++n) {
        const int64_t line = static_cast<int64_t>(n % args.group) * row.queries + n / args.group;
        float* const to = row.logits + line * row.entries * kSlots;
        for (int i = begin * kSlots + static_cast<int>(threadIdx.x); i < end * kSlots; i += S::kThreads)
            to[i] = -INFINITY;
    }
}

// Block x: chunk x / tiles of the list and tile x % tiles of the query rows of row y of the batch.
template <class S>
__global__ void __launch_bounds__(S::kThreads) attend_pages(const __grid_constant__ AttendArgs args) {
    const ops::AttendRow& row = args.batch.rows[blockIdx.y].row;
    const int tiles = args.tiles, index = static_cast<int>(blockIdx.x) / tiles;
    const int first_row = static_cast<int>(blockIdx.x) % tiles * S::kRows, rows = row.queries * args.group;
    if (first_row >= rows) return;
    const int entries = count_entries(row);
    const bool split = rows <= kSplitRows;
    const int chunk = split ? chunk_of(entries) : entries, begin = index * chunk, end = min(begin + chunk, entries);
    if (begin >= entries && index > 0) return;

    auto& block = *reinterpret_cast<Block<S>*>(dynamic_shared());
    unsigned char* const operands = dynamic_shared() + block_bytes<S>();
    unsigned char* const rings = operands + operand_bytes(S::kRows, args.head_dim);
    unsigned char* const memory = rings + (S::kTeam ? 0 : warp()) * args.ring_bytes;
    float* const workspace = args.workspace + args.batch.rows[blockIdx.y].partials;
    const Partials partials = partials_of(rows, row.entries, args.head_dim);
    const int first_query = first_row / args.group;
    const int queries = (min(first_row + S::kRows, rows) - 1) / args.group - first_query + 1;
    const int warp_row = first_row + (S::kTeam ? warp() * S::kWarpRows : 0);

    find_rows(block.rows, args, row, first_row);
    if (row.logits) clear_logits<S>(args, row, first_row, begin, end == entries ? row.entries : end);
    if (split && blockIdx.x == 0 && threadIdx.x == 0) workspace[0] = __int_as_float(chunks_of(entries));
    LaneRows<S> lanes;
#pragma unroll
    for (int q = 0; q < S::kQuads; ++q) {
        const int n = warp_row + 4 * q + lane_b(), t = n / args.group;
        lanes.query[q] = min(t - first_query, queries - 1);
        lanes.line[q] = n < rows ? static_cast<int64_t>(n % args.group) * row.queries + t : -1;
    }

    Sums<S> sums;
    clear(sums);
    int filled = -1, read = 0;  // entries in block.entries; pages of the class of formats that were read
    for (int k = 0; k < 6; ++k) {
        const Format format = static_cast<Format>((k + 3) % 6);
        if (k == 3) {  // from quantized pages to full ones
            __syncthreads();
            if constexpr (S::kTeam) {
                if (read) rotate_back(sums, args, reinterpret_cast<float*>(rings) + warp() * 4 * args.head_dim);
            } else {
                read ? join_walkers(sums, args, block, rings, workspace, partials, 2 * index, first_row)
                     : write_nothing<S>(workspace, partials, 2 * index, first_row);
                clear(sums);
                read = 0;
            }
        }
        if (!(args.formats >> static_cast<int>(format) & 1)) continue;
        const Staged how = staged(format, args.head_dim);
        bool prepared = false;
        for (int first = begin; first < end; first += kMaxChunk) {
            __syncthreads();  // all are done with the list, the operands and the rings
            if (filled != first) {
                fill_entries(block.entries, args, row, first, min(kMaxChunk, end - first), entries, first_query,
                             queries);
                filled = first;
                __syncthreads();
            }
            if (warp() == 0) list_entries(block.entries, format);
            __syncthreads();
            if (!block.entries.count) continue;
            read += block.entries.count;
            Ring<S> ring(memory, args.ring_bytes, how, block.entries, S::kTeam ? 0 : warp());
            if (!prepared) {  // while the first pages are under way
                prepare_queries(operands, block.rows, args, row, format);
                prepared = true;
                __syncthreads();
            }
            walk_list(sums, ring, format, how, args, row, block, lanes, operands, first);
        }
    }
    if constexpr (S::kTeam) {
        split ? write_partial(sums, workspace, partials, index, warp_row) : write_results(sums, args, row, warp_row);
    } else {
        __syncthreads();
        read ? join_walkers(sums, args, block, rings, workspace, partials, 2 * index + 1, first_row)
             : write_nothing<S>(workspace, partials, 2 * index + 1, first_row);
    }
}

// Bytes of a walker's ring for pages of these formats, so that a block has at most `most` bytes: as many units as fit, up to
// three of the largest format. The sums of the walk's end fit, too.
template <class S>
int ring_bytes(const AttendArgs& args, int most) {
    int unit = 0;
    for (int f = 0; f < 6; ++f)
        if (args.formats >> f & 1) unit = std::max(unit, staged(static_cast<Format>(f), args.head_dim).bytes);
    const int room = (most - shared_bytes<S>(args.head_dim, 0)) / S::kWalkers;
    const int units = unit ? std::clamp(room / unit, 1, 3) : 0;
    const int sums = (S::kTeam ? 4 * S::kWarps : S::kRows) * padded_dim(args.head_dim) * 4;
    return round_up(std::max(units * unit, sums), 128);
}

inline constexpr int kMostShared = 160 * 1024;  // what a block of every device from sm_80 on may have, less some

// One launch for a batch. `chunks`: most of a row.
template <class S>
int launch_pages(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    args.tiles = (most_rows + S::kRows - 1) / S::kRows;
    args.ring_bytes = ring_bytes<S>(args, kMostShared);
    const dim3 grid(static_cast<unsigned>(chunks) * static_cast<unsigned>(args.tiles),
                    static_cast<unsigned>(args.batch.count));
    return launch("attend", attend_pages<S>, grid, S::kThreads,
                  static_cast<size_t>(shared_bytes<S>(args.head_dim, args.ring_bytes)), stream, args);
}

// How many query rows the rows of a batch have.
enum class Width { quad, octet, team };

int launch_128(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);  // up to 128 dims
int launch_256(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);
int launch_512(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);

}  // namespace kvstrata::cuda
