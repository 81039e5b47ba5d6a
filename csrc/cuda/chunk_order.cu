// chunk_order on CUDA: one block per row. The order is in ops/chunk_order.h.
//
// A stable sort by digits of 8 bits: of the kinds and values five passes, of the positions four more where the tokens do not lie
// in their order. A pass reads 32 bytes a token and writes 16, in the L2 cache; its scattered writes bound it.
#include "common/places.h"
#include "cuda/api.h"
#include "cuda/device/rows.cuh"
#include "cuda/device/sort.cuh"

namespace kvstrata::cuda {
namespace {

struct OrderRow {
    ops::ChunkOrderRow row;
    Keyed *first, *second;  // [N]
};

struct OrderArgs {
    RowBatch<OrderRow> batch;
    int32_t tokens, chunks;
};

struct OrderRoom {
    SortRoom sort;
    int tokens[kDigits], chunks[kDigits];  // before those of a kind
    bool sorted;                           // tokens lie in the order of their positions
};

__device__ inline Keyed keyed(const ops::ChunkOrderRow& row, int i) {
    const uint32_t by_age = static_cast<uint32_t>(row.pos[i]) ^ 0x80000000u;
    return {static_cast<uint64_t>(~ordered(row.value[i])) << 32 | by_age, i, row.kind[i]};
}

// w of chunk m, of the kind that it belongs to: f32, one token after the other.
__device__ inline float sum_chunk(const ops::ChunkOrderRow& row, const OrderRoom& room, int m, int n) {
    int kind = 0;
    for (int step = kDigits / 2; step > 0; step /= 2) {
        if (room.chunks[kind + step] <= m) kind += step;
    }
    const int first = room.tokens[kind] + (m - room.chunks[kind]) * kSlots;
    const int end = min(first + kSlots, kind + 1 < kDigits ? room.tokens[kind + 1] : n);
    float total = 0.0f;
    for (int at = first; at < end; ++at) total += row.value[row.order[at]];
    return total;
}

__global__ void __launch_bounds__(kSortThreads) order_rows(const __grid_constant__ OrderArgs args) {
    __shared__ OrderRoom room;
    const OrderRow& work = args.batch.rows[blockIdx.x];
    const ops::ChunkOrderRow& row = work.row;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) room.sorted = true;
    const int n = place_in_order(
        args.tokens, room.sort.warps, [&](int i) { return row.kind[i] != 0; },
        [&](int at, int i) { work.first[at] = keyed(row, i); });
    for (int at = thread + 1; at < n; at += kSortThreads) {
        if (row.pos[work.first[at].item] < row.pos[work.first[at - 1].item]) room.sorted = false;
    }
    __syncthreads();
    Keyed* sorted = sort_keys(work.first, work.second, n, room.sorted ? 32 : 0, room.sort);
    Keyed* const other = sorted == work.first ? work.second : work.first;
    if (sort_pass(sorted, other, n, room.sort, [](const Keyed& x) { return x.part; })) sorted = other;
    for (int at = thread; at < args.tokens; at += kSortThreads) row.order[at] = at < n ? sorted[at].item : -1;
    if (thread < kDigits) room.tokens[thread] = 0;
    __syncthreads();
    each_of_warp(Segment(n), [&](int at, bool inside) { tally(room.tokens, inside ? sorted[at].part : 0, inside); });
    __syncthreads();
    const int mine = thread < kDigits ? room.tokens[thread] : 0, chunks = (mine + kSlots - 1) / kSlots;
    const int tokens_before = sum_before(mine, room.sort.warps);
    const int chunks_before = sum_before(chunks, room.sort.warps);
    if (thread < kDigits) room.tokens[thread] = tokens_before, room.chunks[thread] = chunks_before;
    if (thread == kDigits - 1) *row.items = chunks_before + chunks;
    __syncthreads();
    const int items = *row.items;
    for (int m = thread; m < args.chunks; m += kSortThreads) row.w[m] = m < items ? sum_chunk(row, room, m, n) : 0.0f;
}

int64_t place_row(OrderRow& work, int64_t tokens, void* base) {
    Places places(base);
    work.first = places.take<Keyed>(tokens);
    work.second = places.take<Keyed>(tokens);
    return places.bytes();
}

}  // namespace
}  // namespace kvstrata::cuda

int64_t kvstrata_cuda_chunk_order_workspace_bytes(const kvstrata::ops::ChunkOrderParams* params) {
    kvstrata::cuda::OrderRow work{};
    return kvstrata::cuda::place_row(work, params->tokens, nullptr) * params->n_rows;
}

int kvstrata_cuda_chunk_order(const kvstrata::ops::ChunkOrderParams* params, void* stream) {
    using namespace kvstrata::cuda;
    const auto& p = *params;
    auto* base = static_cast<unsigned char*>(p.workspace);
    const auto row_of = [&](const kvstrata::ops::ChunkOrderRow& row) {
        OrderRow work{row, nullptr, nullptr};
        base += place_row(work, p.tokens, base);
        return work;
    };
    return in_batches_of<OrderRow>(p.rows, p.n_rows, row_of, [&](const RowBatch<OrderRow>& batch) {
        return launch("chunk_order", order_rows, dim3(static_cast<unsigned>(batch.count)), dim3(kSortThreads), 0,
                      static_cast<cudaStream_t>(stream), OrderArgs{batch, p.tokens, p.chunks});
    });
}
