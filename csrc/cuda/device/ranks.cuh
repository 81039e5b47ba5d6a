// Ranks within a block: the n-th largest of many keys, places in order, sums before each digit.
//
// A warp owns a contiguous segment of the elements and walks it 32 at a time, so that reads are coalesced, two barriers place
// all of them in order, and what is summed over them has one order, whatever else runs.
#pragma once

#include "cuda/device/warp.cuh"

namespace kvstrata::cuda {

inline constexpr int kDigits = 256;   // of eight bits
inline constexpr int kMaxWarps = 32;  // of a block

// An order of floats as unsigned integers; -0 is 0, every NaN above all.
__device__ inline uint32_t ordered(float x) {
    if (x != x) return ~uint32_t{0};
    uint32_t bits = __float_as_uint(x);
    if (bits == 0x80000000u) bits = 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Of n elements those of this warp, a multiple of 32 of them but for the last: [begin, end).
struct Segment {
    int begin, end;

    __device__ explicit Segment(int n) {
        const int most = (n + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x) * kWarp;
        begin = min(n, warp() * most);
        end = min(n, begin + most);
    }
};

// visit(i, inside) for this warp's elements, by all lanes at once; not inside: i is beyond the segment.
template <class Visit>
__device__ void each_of_warp(const Segment& segment, Visit visit) {
    for (int first = segment.begin; first < segment.end; first += kWarp) {
        const int i = first + lane();
        visit(i, i < segment.end);
    }
}

__device__ inline int lanes_below(unsigned lanes) { return __popc(lanes & ((1u << lane()) - 1)); }

// Over the warp, of those before a lane and itself.
template <class T>
__device__ T sum_upto(T x) {
    for (int step = 1; step < kWarp; step *= 2) {
        const T other = __shfl_up_sync(kAllLanes, x, step);
        if (lane() >= step) x += other;
    }
    return x;
}

// put(place, i) for those of n elements that is(i) holds for, places 0, 1, ... rising with i. Returns how many there are.
// room [kMaxWarps] is shared memory.
template <class Is, class Put>
__device__ int place_in_order(int n, int* room, Is is, Put put) {
    const Segment segment(n);
    int mine = 0;
    each_of_warp(segment, [&](int i, bool inside) { mine += __popc(__ballot_sync(kAllLanes, inside && is(i))); });
    if (lane() == 0) room[warp()] = mine;
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < warps(); ++w) {
        if (w < warp()) before += room[w];
        all += room[w];
    }
    each_of_warp(segment, [&](int i, bool inside) {
        const bool yes = inside && is(i);
        const unsigned lanes = __ballot_sync(kAllLanes, yes);
        if (yes) put(before + lanes_below(lanes), i);
        before += __popc(lanes);
    });
    __syncthreads();
    return all;
}

// How many of n elements is(i) holds for.
template <class Is>
__device__ int count_of(int n, int* room, Is is) {
    int mine = 0;
    each_of_warp(Segment(n), [&](int i, bool inside) { mine += __popc(__ballot_sync(kAllLanes, inside && is(i))); });
    if (lane() == 0) room[warp()] = mine;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < warps(); ++w) all += room[w];
    __syncthreads();
    return all;
}

// Adds one to counts[digit] of every lane that counts; lanes of one digit together.
__device__ inline void tally(int* counts, int digit, bool counted) {
    const unsigned peers = __match_any_sync(kAllLanes, counted ? digit : -1);
    if (counted && lanes_below(peers) == 0) atomicAdd(counts + digit, __popc(peers));
}

struct RankRoom {
    int count[kDigits];
    int warps[kMaxWarps];
    int digit, need;
    bool whole;
};

inline constexpr int kAllTies = 0x7FFFFFFF;

struct Rank {
    uint64_t key;  // what is above is taken,
    int ties;      // and so many that are equal, or kAllTies
};

// The need-th largest of the keys that key_of(i) gives of n elements, 1 <= need <= how many there are; 0: no key.
template <class KeyOf>
__device__ Rank nth_largest(int n, int need, RankRoom& room, KeyOf key_of) {
    uint64_t prefix = 0;
    for (int shift = 56;; shift -= 8) {
        for (int d = static_cast<int>(threadIdx.x); d < kDigits; d += static_cast<int>(blockDim.x)) room.count[d] = 0;
        __syncthreads();
        each_of_warp(Segment(n), [&](int i, bool inside) {
            const uint64_t key = inside ? key_of(i) : 0;
            const bool counted = key != 0 && (shift == 56 || key >> (shift + 8) == prefix);
            tally(room.count, static_cast<int>(key >> shift & (kDigits - 1)), counted);
        });
        __syncthreads();
        if (warp() == 0) {  // lane 0 has the highest eight digits
            constexpr int kRun = kDigits / kWarp;
            const int top = kDigits - 1 - kRun * lane();
            int mine = 0;
            for (int j = 0; j < kRun; ++j) mine += room.count[top - j];
            int above = sum_upto(mine) - mine;
            for (int j = 0; j < kRun; ++j) {
                const int here = room.count[top - j];
                if (above < need && need <= above + here) {
                    room.digit = top - j, room.need = need - above, room.whole = need == above + here;
                }
                above += here;
            }
        }
        __syncthreads();
        prefix = prefix << 8 | static_cast<unsigned>(room.digit);
        need = room.need;
        const bool whole = room.whole;
        __syncthreads();
        if (whole) return {prefix << shift, kAllTies};
        if (shift == 0) return {prefix, need};
    }
}

}  // namespace kvstrata::cuda
