// Exactly sixteen tokens to a page, by bids (ops/cluster.h): a launch per round, in which pages do not see each other.
#pragma once

#include "cuda/device/clusters.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kSeatThreads = 256;  // a warp per page, or per token
constexpr int kBids = 128;         // that a warp holds at a time
constexpr int kNone = 0x7FFFFFFF;

__device__ inline float number(float x) { return isnan(x) ? -INFINITY : x; }  // an order needs numbers

// A number and its index; the larger number is before, ties the lower index.
struct Best {
    float x = -INFINITY;
    int at = kNone;

    __device__ bool after(const Best& other) const { return other.x > x || (other.x == x && other.at < at); }
    __device__ void take(const Best& other) {
        if (after(other)) *this = other;
    }
    __device__ Best of_warp() const {
        Best all = *this;
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) {
            all.take({__shfl_xor_sync(kAllLanes, all.x, step), __shfl_xor_sync(kAllLanes, all.at, step)});
        }
        return all;
    }
};

// The best pages of every token, and by how much each is better than the next. A warp per token.
__global__ void __launch_bounds__(kSeatThreads) rank_pages(const ClusterWork* works, int stride) {
    const ClusterWork& work = works[blockIdx.y];
    const int n = *work.live, pages = pages_of(n), i = static_cast<int>(blockIdx.x) * warps() + warp();
    if (i >= n) return;
    const float* const s = work.s + static_cast<int64_t>(i) * padded_pages(n);
    Best mine[kRanks + 1];  // of this lane's pages, in order
    for (int j = lane(); j < pages; j += kWarp) {
        Best one{number(s[j]), j};
#pragma unroll
        for (int c = 0; c <= kRanks; ++c) {
            if (!mine[c].after(one)) continue;
            const Best moved = mine[c];
            mine[c] = one, one = moved;
        }
    }
    Best last;
    for (int c = 0; c <= min(kRanks, pages - 1); ++c) {
        const Best now = mine[0].of_warp();
        if (mine[0].at == now.at) {
#pragma unroll
            for (int k = 0; k < kRanks; ++k) mine[k] = mine[k + 1];
            mine[kRanks] = {};
        }
        if (lane() == 0 && c < kRanks) work.wanted[static_cast<int64_t>(c) * stride + i] = now.at;
        if (lane() == 0 && c < kRanks)
            work.priority[static_cast<int64_t>(c) * stride + i] = 0.0f;  // if there is no next
        if (lane() == 0 && c > 0) work.priority[static_cast<int64_t>(c - 1) * stride + i] = number(last.x - now.x);
        last = now;
    }
}

// Each unseated token's best page with room. A warp per token.
__global__ void __launch_bounds__(kSeatThreads) find_room(const ClusterWork* works) {
    const ClusterWork& work = works[blockIdx.y];
    const int n = *work.live, pages = pages_of(n), i = static_cast<int>(blockIdx.x) * warps() + warp();
    if (i >= n) return;
    Best best;
    if (work.row.page_of[work.tokens[i]] < 0) {
        const float* const s = work.s + static_cast<int64_t>(i) * padded_pages(n);
        for (int j = lane(); j < pages; j += kWarp) {
            if (work.room[j] > 0) best.take({number(s[j]), j});
        }
        best = best.of_warp();
    }
    if (lane() == 0) work.wanted[i] = best.at == kNone ? -1 : best.at, work.priority[i] = best.x;
}

// Of `count` bids, all different, the `room` highest. Returns how many are left.
__device__ inline int highest(uint64_t* bids, int count, int room) {
    uint64_t mine[kBids / kWarp];
    int above[kBids / kWarp];
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kBids / kWarp; ++k) {
        const int at = k * kWarp + lane();
        mine[k] = at < count ? bids[at] : 0, above[k] = at < count ? 0 : kBids;
        for (int other = 0; other < count; ++other) above[k] += bids[other] > mine[k];
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kBids / kWarp; ++k) {
        if (above[k] < room) bids[above[k]] = mine[k];
    }
    __syncwarp();
    return min(count, room);
}

// A page takes the bids of a round by falling priority, ties the lower token, while it has room. A warp per page.
__global__ void __launch_bounds__(kSeatThreads) take_bids(const ClusterWork* works, int round, int stride) {
    __shared__ uint64_t bids_of_warps[kSeatThreads / kWarp][kBids];
    const ClusterWork& work = works[blockIdx.y];
    const int n = *work.live, pages = pages_of(n), j = static_cast<int>(blockIdx.x) * warps() + warp();
    if (j >= pages || round >= pages || work.room[j] == 0) return;
    const int room = work.room[j];
    const int32_t* const wanted = work.wanted + static_cast<int64_t>(round) * stride;
    const float* const priority = work.priority + static_cast<int64_t>(round) * stride;
    uint64_t* const bids = bids_of_warps[warp()];
    int count = 0;
#pragma unroll 4
    for (int first = 0; first < n; first += kWarp) {
        const int i = first + lane();
        const bool bid = i < n && wanted[i] == j && work.row.page_of[work.tokens[i]] < 0;
        const unsigned lanes = __ballot_sync(kAllLanes, bid);
        if (!lanes) continue;
        if (count + kWarp > kBids) count = highest(bids, count, room);
        const uint64_t key = bid ? static_cast<uint64_t>(ordered(priority[i])) << 32 | ~static_cast<uint32_t>(i) : 0;
        if (bid) bids[count + lanes_below(lanes)] = key;
        count += __popc(lanes);
    }
    if (count > room) count = highest(bids, count, room);
    __syncwarp();
    if (lane() < count) work.row.page_of[work.tokens[~static_cast<uint32_t>(bids[lane()])]] = j;
    if (lane() == 0) work.room[j] = room - count;
}

// The tokens that still wait fill the free seats, both in order. A block per row.
__global__ void __launch_bounds__(kListThreads) fill_seats(const ClusterWork* works) {
    __shared__ int counts[kMaxWarps];
    const ClusterWork& work = works[blockIdx.x];
    const int n = *work.live, pages = pages_of(n);
    const int waiting = place_in_order(
        n, counts, [&](int i) { return work.row.page_of[work.tokens[i]] < 0; },
        [&](int at, int i) { work.nearest[at] = i; });
    if (waiting == 0 || warp() != 0) return;
    for (int first = 0, before = 0; first < pages && before < waiting; first += kWarp) {
        const int j = first + lane(), room = j < pages ? work.room[j] : 0;
        const int upto = sum_upto(room);
        for (int at = before + upto - room; at < min(waiting, before + upto); ++at) {
            work.row.page_of[work.tokens[work.nearest[at]]] = j;
        }
        before += __shfl_sync(kAllLanes, upto, kWarp - 1);
    }
}

}  // namespace
}  // namespace kvstrata::cuda
