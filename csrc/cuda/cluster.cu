// cluster and cluster_greedy on CUDA. The formulas are in ops/cluster.h.
//
// cluster: a row's work is (iters + 1) n C D products, in f32 and one chain of FMAs over the channels each, as on the CPU, so
// that near-ties fall alike. Bound by arithmetic: 64 keys by 64 centroids to a block, 4 by 4 to a thread. The rest is launches
// over what lies in the L2 cache: a warp per centroid sums its keys in token order, a warp per page takes bids.
// cluster_greedy: n / 16 steps of n products, one block per row.
//
// Nothing waits for the host: launches are shaped by T, and what lies beyond a row's live tokens returns at once.
#include "common/places.h"
#include "cuda/api.h"
#include "cuda/device/clusters.cuh"
#include "cuda/device/greedy.cuh"
#include "cuda/device/nearest.cuh"
#include "cuda/device/seats.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kLateRounds = 8;  // of bids for what has room

int64_t longest(const ops::ClusterParams& p) {
    int64_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) most = most > p.rows[r].tokens ? most : p.rows[r].tokens;
    return most;
}

// Places of a row of up to so many tokens. Returns their bytes.
int64_t place_work(ClusterWork& work, int64_t tokens, int64_t dim, bool greedy, void* base) {
    const int64_t pages = (tokens + kSlots - 1) / kSlots, wide = (pages + 15) / 16 * 16, ranks = greedy ? 1 : kRanks;
    Places places(base);
    work.live = places.take<int32_t>(1);
    work.tokens = places.take<int32_t>(tokens);
    work.parts = places.take<float>((tokens + kChunk - 1) / kChunk * dim);
    work.y = places.take<float>(tokens * dim);
    work.z = places.take<float>(greedy ? 0 : pages * dim);
    work.s = places.take<float>(greedy ? tokens : tokens * wide);
    work.nearest = places.take<int32_t>(greedy ? 0 : tokens);
    work.wanted = places.take<int32_t>(greedy ? 0 : ranks * tokens);
    work.priority = places.take<float>(ranks * tokens);
    work.room = places.take<int32_t>(pages);
    return places.bytes();
}

// Where launches after the first find the rows of a batch.
constexpr int64_t kWorksBytes = (RowBatch<ClusterWork>::kMost * sizeof(ClusterWork) + 63) / 64 * 64;

int64_t workspace_bytes(const ops::ClusterParams& p, bool greedy) {
    ClusterWork work{};
    return kWorksBytes + p.n_rows * place_work(work, longest(p), padded_dim(p.head_dim), greedy, nullptr);
}

// Launches of one op over a batch of rows; after one that failed none follows.
struct Launches {
    const char* op;
    cudaStream_t stream;
    unsigned rows;
    const ClusterWork* works;
    int code = 0;

    // A grid of (as many blocks as hold n, rows), or of rows alone.
    template <class... P, class... A>
    void over(int64_t n, int each, void (*kernel)(const ClusterWork*, P...), int threads, A... args) {
        if (code == 0)
            code = launch(op, kernel, dim3(blocks_for(n, each), rows), dim3(threads), 0, stream, works, args...);
    }
    template <class... P, class... A>
    void over_rows(void (*kernel)(const ClusterWork*, P...), int threads, A... args) {
        if (code == 0) code = launch(op, kernel, dim3(rows), dim3(threads), 0, stream, works, args...);
    }
};

void cluster_batch(Launches& go, int64_t tokens, int dim, int iters) {
    constexpr int kCentroids = kCentroidThreads / kWarp, kSeats = kSeatThreads / kWarp;
    const int64_t pages = (tokens + kSlots - 1) / kSlots;
    const int stride = static_cast<int>(tokens);
    go.over(pages, kCentroids, seed_centroids, kCentroidThreads, dim);
    for (int i = 0; i < iters; ++i) {
        go.over(tokens, kTile, compare_keys<false>, kTileThreads, dim);
        go.over(pages, kCentroids, move_centroids, kCentroidThreads, dim);
    }
    go.over(tokens, kTile, compare_keys<true>, kTileThreads, dim);
    go.over(tokens, kSeats, rank_pages, kSeatThreads, stride);
    for (int round = 0; round < kRanks; ++round) go.over(pages, kSeats, take_bids, kSeatThreads, round, stride);
    for (int round = 0; round < kLateRounds; ++round) {
        go.over(tokens, kSeats, find_room, kSeatThreads);
        go.over(pages, kSeats, take_bids, kSeatThreads, 0, stride);
    }
    go.over_rows(fill_seats, kListThreads);
}

int run(const char* op, const ops::ClusterParams& p, bool greedy, void* stream) {
    const int64_t tokens = longest(p);
    const int dim = padded_dim(p.head_dim);
    auto* const works = static_cast<ClusterWork*>(p.workspace);
    auto* base = static_cast<unsigned char*>(p.workspace) + kWorksBytes;
    const auto on = static_cast<cudaStream_t>(stream);
    const auto work_of = [&](const ops::ClusterRow& row) {
        ClusterWork work{};
        base += place_work(work, tokens, dim, greedy, base);
        work.row = row;
        return work;
    };
    return in_batches_of<ClusterWork>(p.rows, p.n_rows, work_of, [&](const RowBatch<ClusterWork>& batch) {
        Launches go{op, on, static_cast<unsigned>(batch.count), works};
        go.code = launch(op, list_live, dim3(go.rows), dim3(kListThreads), 0, on, batch, works);
        if (tokens == 0) return go.code;
        go.over(tokens, kChunk, sum_keys, kChunkThreads, p.head_dim);
        go.over(tokens, kChunk, centre_keys, kChunkThreads, p.head_dim);
        if (greedy) {
            go.over_rows(fill_pages, kGreedyThreads, dim);
        } else {
            cluster_batch(go, tokens, dim, p.iters);
        }
        return go.code;
    });
}

}  // namespace
}  // namespace kvstrata::cuda

int64_t kvstrata_cuda_cluster_workspace_bytes(const kvstrata::ops::ClusterParams* params) {
    return kvstrata::cuda::workspace_bytes(*params, false);
}

int kvstrata_cuda_cluster(const kvstrata::ops::ClusterParams* params, void* stream) {
    return kvstrata::cuda::run("cluster", *params, false, stream);
}

int64_t kvstrata_cuda_cluster_greedy_workspace_bytes(const kvstrata::ops::ClusterParams* params) {
    return kvstrata::cuda::workspace_bytes(*params, true);
}

int kvstrata_cuda_cluster_greedy(const kvstrata::ops::ClusterParams* params, void* stream) {
    return kvstrata::cuda::run("cluster_greedy", *params, true, stream);
}
