// A stable sort by one block, digit by digit from the lowest; digits in which all agree cost half a pass.
#pragma once

#include "cuda/device/ranks.cuh"

namespace kvstrata::cuda {

inline constexpr int kSortThreads = 512;

struct Keyed {
    uint64_t key;
    int32_t item;
    int32_t part;
};

struct SortRoom {
    int count[kSortThreads / kWarp][kDigits];  // of each warp; then where its next one goes
    int warps[kMaxWarps];
    bool one;
};

// Of kDigits numbers, one of each of the first threads, the sum of those before it. Other threads bring 0.
__device__ inline int sum_before(int x, int* room) {
    const int upto = sum_upto(x);
    if (lane() == kWarp - 1) room[warp()] = upto;
    __syncthreads();
    int before = upto - x;
    for (int w = 0; w < warp(); ++w) before += room[w];
    __syncthreads();
    return before;
}

// to [n] = from [n] by rising digit_of(x), 0..255, those of one digit in their order. False, and nothing is done, where all have
// the same. A block of kSortThreads.
template <class Digit>
__device__ bool sort_pass(const Keyed* from, Keyed* to, int n, SortRoom& room, Digit digit_of) {
    const int thread = static_cast<int>(threadIdx.x);
    for (int d = lane(); d < kDigits; d += kWarp) room.count[warp()][d] = 0;
    if (thread == 0) room.one = n == 0;
    __syncthreads();
    const Segment segment(n);
    each_of_warp(segment,
                 [&](int i, bool inside) { tally(room.count[warp()], inside ? digit_of(from[i]) : 0, inside); });
    __syncthreads();
    int total = 0;
    for (int w = 0; thread < kDigits && w < warps(); ++w) total += room.count[w][thread];
    if (total == n) room.one = true;
    int at = sum_before(total, room.warps);
    for (int w = 0; thread < kDigits && w < warps(); ++w) {
        const int here = room.count[w][thread];
        room.count[w][thread] = at;
        at += here;
    }
    __syncthreads();
    const bool one = room.one;
    __syncthreads();  // before another pass sets it
    if (one) return false;
    each_of_warp(segment, [&](int i, bool inside) {
        const Keyed x = inside ? from[i] : Keyed{};
        const int digit = inside ? digit_of(x) : -1;
        const unsigned peers = __match_any_sync(kAllLanes, digit);
        int* const next = &room.count[warp()][inside ? digit : 0];
        const int first = inside ? *next : 0;
        __syncwarp();
        if (inside) to[first + lanes_below(peers)] = x;
        if (inside && lanes_below(peers) == 0) *next = first + __popc(peers);
        __syncwarp();
    });
    __syncthreads();
    return true;
}

// By rising bits of the key from `low` on. Returns where the result is: one of the two.
__device__ inline Keyed* sort_keys(Keyed* from, Keyed* to, int n, int low, SortRoom& room) {
    for (int shift = low; shift < 64; shift += 8) {
        const auto digit = [&](const Keyed& x) { return static_cast<int>(x.key >> shift & (kDigits - 1)); };
        if (!sort_pass(from, to, n, room, digit)) continue;
        Keyed* const sorted = to;
        to = from, from = sorted;
    }
    return from;
}

}  // namespace kvstrata::cuda
