// choose_chunks on CUDA: one block. The rule is in ops/choose_chunks.h.
//
// Sixty-four bisections over the items in f64, each a sum in whole numbers; then a sort of what is left, which one warp takes in
// order, 32 steps at a time. No part of it is large: a launch that waits for its own barriers.
#include "common/places.h"
#include "cuda/api.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/sort.cuh"
#include "ops/choose_chunks.h"

namespace kvstrata::cuda {
namespace {

constexpr int kBisections = 64;
constexpr double kAbove = 1 + 1.0 / (1 << 20);  // of the largest density: nothing is worth that
constexpr int64_t kMostCost = 0x7FFFFFFFFFFFFFFF;

// An order of non-negative and negative numbers as unsigned integers; -0 is 0.
__device__ inline uint64_t ordered(double x) {
    constexpr uint64_t kSign = uint64_t{1} << 63;
    auto bits = static_cast<uint64_t>(__double_as_longlong(x));
    if (bits == kSign) bits = 0;
    return bits & kSign ? ~bits : bits | kSign;
}

// What a step up of a ladder costs and is worth.
struct Rise {
    double worth, price_f64;
    int64_t price;
};

struct ChunkArgs {
    ops::ChooseChunksParams p;
    Rise* rises;                   // [F, J - 1]
    uint8_t *low, *high, *middle;  // [n] steps at the ends of the bisection, high: of lambda, and between
    Keyed *first, *second;         // [n (J - 1)]
};

struct ChunkRoom {
    SortRoom sort;
    int64_t parts[kMaxWarps];
    double most[kMaxWarps];
};

class Chunks {
  public:
    __device__ Chunks(const ChunkArgs& args, ChunkRoom& room)
        : a_(args), p_(args.p), up_(args.p.steps - 1), room_(room) {}

    __device__ void run() {
        list_rises();
        const double level = bisect();
        fill();
        if (threadIdx.x == 0) *p_.level = level, *p_.held = held_;
    }

  private:
    template <class Visit>
    __device__ void each(Visit visit) {
        for (int i = static_cast<int>(threadIdx.x); i < p_.items; i += kSortThreads) visit(i);
    }
    __device__ int64_t sum(int64_t x) {
        for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
        if (lane() == 0) room_.parts[warp()] = x;
        __syncthreads();
        x = 0;
        for (int w = 0; w < warps(); ++w) x += room_.parts[w];
        __syncthreads();
        return x;
    }
    __device__ double largest(double x) {
        for (int step = kWarp / 2; step > 0; step /= 2) {
            const double other = __shfl_xor_sync(kAllLanes, x, step);
            x = other > x ? other : x;
        }
        if (lane() == 0) room_.most[warp()] = x;
        __syncthreads();
        for (int w = 0; w < warps(); ++w) x = room_.most[w] > x ? room_.most[w] : x;
        __syncthreads();
        return x;
    }

    __device__ void list_rises() {
        for (int k = static_cast<int>(threadIdx.x); k < up_ * p_.ladders; k += kSortThreads) {
            const int below = k % up_ * p_.ladders + k / up_, above = below + p_.ladders;
            const int64_t price = p_.cost[above] - p_.cost[below];
            const double worth = static_cast<double>(p_.fidelity[above]) - static_cast<double>(p_.fidelity[below]);
            a_.rises[k] = {worth, static_cast<double>(price), price};
        }
        __syncthreads();
    }
    __device__ const Rise* rises(int i) const { return a_.rises + p_.ladder[i] * up_; }
    __device__ int64_t cost(int i, int j) const { return p_.cost[j * p_.ladders + p_.ladder[i]]; }
    __device__ double density(int i, const Rise& rise) const {
        return static_cast<double>(p_.w[i]) * rise.worth / rise.price_f64;
    }

    // The item's step at a level, known to be in low..high.
    __device__ int chosen(int i, double level, int low, int high) const {
        const Rise* const up = rises(i);
        const double w = p_.w[i];
        int j = low;
        while (j < high && w * up[j].worth > level * up[j].price_f64) ++j;
        return j;
    }

    // Lambda, with the steps and what they cost.
    __device__ double bisect() {
        double densest = 0.0;
        each([&](int i) {
            const Rise* const up = rises(i);
            for (int j = 0; j < up_ && up[j].price > 0; ++j) {
                const double d = density(i, up[j]);
                densest = d > densest ? d : densest;
            }
        });
        double low = 0.0, level = largest(densest) * kAbove;
        int64_t dear = 0;
        each([&](int i) {
            a_.low[i] = static_cast<uint8_t>(chosen(i, 0.0, 0, up_));
            a_.high[i] = static_cast<uint8_t>(chosen(i, level, 0, up_));
            p_.step[i] = a_.low[i];
            dear += cost(i, a_.low[i]);
        });
        held_ = sum(dear);
        if (held_ <= p_.budget) return 0.0;
        for (int round = 0; round < kBisections; ++round) {
            const double middle = (low + level) / 2;
            int64_t held = 0;
            each([&](int i) {
                a_.middle[i] = static_cast<uint8_t>(chosen(i, middle, a_.high[i], a_.low[i]));
                held += cost(i, a_.middle[i]);
            });
            const bool fits = sum(held) <= p_.budget;
            (fits ? level : low) = middle;
            each([&](int i) { (fits ? a_.high : a_.low)[i] = a_.middle[i]; });
        }
        int64_t held = 0;
        each([&](int i) {
            p_.step[i] = a_.high[i];
            held += cost(i, a_.high[i]);
        });
        held_ = sum(held);
        return level;
    }

    __device__ int64_t cheapest_rise() {
        int64_t least = kMostCost;
        for (int k = static_cast<int>(threadIdx.x); k < up_ * p_.ladders; k += kSortThreads) {
            if (a_.rises[k].price > 0) least = min(least, a_.rises[k].price);
        }
        for (int step = kWarp / 2; step > 0; step /= 2) least = min(least, __shfl_xor_sync(kAllLanes, least, step));
        if (lane() == 0) room_.parts[warp()] = least;
        __syncthreads();
        for (int w = 0; w < warps(); ++w) least = min(least, room_.parts[w]);
        __syncthreads();
        return least;
    }
    __device__ static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

    // visit(j, density) for the further steps of an item that there is room for. Rounding must not put a step before the one
    // below it.
    template <class Visit>
    __device__ void each_step(int i, int64_t room, Visit visit) const {
        const Rise* const up = rises(i);
        double least = INFINITY;
        for (int j = 0; j < up_; ++j) {
            if (up[j].price <= 0 || (j >= p_.step[i] && up[j].price > room)) break;
            const double d = density(i, up[j]);
            least = d < least ? d : least;
            if (j >= p_.step[i]) visit(j, least);
        }
    }

    // Further steps by falling density. What does not fit once never does, nor what lies above it.
    __device__ void fill() {
        int64_t room = p_.budget - held_;
        const int64_t cheapest = cheapest_rise();
        if (room < cheapest) return;
        const int n = list_steps(room);
        const Keyed* const sorted = sort_keys(a_.first, a_.second, n, 0, room_.sort);
        if (warp() == 0) {
            for (int first = 0; first < n && room >= cheapest; first += kWarp) room = take(sorted, first, n, room);
            held_ = p_.budget - room;
        }
    }

    // The steps in order of their items. Returns how many.
    __device__ int list_steps(int64_t room) {
        const Segment segment(p_.items);
        int mine = 0;
        for (int i = segment.begin + lane(); i < segment.end; i += kWarp) {
            each_step(i, room, [&](int, double) { ++mine; });
        }
        mine = __reduce_add_sync(kAllLanes, mine);
        if (lane() == 0) room_.sort.warps[warp()] = mine;
        __syncthreads();
        int before = 0, all = 0;
        for (int w = 0; w < warps(); ++w) {
            before += w < warp() ? room_.sort.warps[w] : 0;
            all += room_.sort.warps[w];
        }
        each_of_warp(segment, [&](int i, bool inside) {
            int count = 0;
            if (inside) each_step(i, room, [&](int, double) { ++count; });
            const int upto = sum_upto(count);
            int at = before + upto - count;
            if (inside) each_step(i, room, [&](int j, double d) { a_.first[at++] = {~ordered(d), i, j}; });
            before += __shfl_sync(kAllLanes, upto, kWarp - 1);
        });
        __syncthreads();
        return all;
    }

    // One warp: each of 32 steps if the one below it was taken and it fits. Returns the room that is left.
    __device__ int64_t take(const Keyed* sorted, int first, int n, int64_t room) {
        const bool inside = first + lane() < n;
        const Keyed x = inside ? sorted[first + lane()] : Keyed{};
        const int64_t price = inside ? rises(x.item)[x.part].price : 0;
        for (int next = 0;;) {
            const bool fits = inside && lane() >= next && p_.step[x.item] == x.part && price <= room;
            const unsigned lanes = __ballot_sync(kAllLanes, fits);
            if (!lanes) return room;
            const int taken = __ffs(static_cast<int>(lanes)) - 1;
            room -= __shfl_sync(kAllLanes, price, taken);
            if (lane() == taken) p_.step[x.item] = static_cast<uint8_t>(x.part + 1);
            next = taken + 1;
            __syncwarp();
        }
    }

    const ChunkArgs& a_;
    const ops::ChooseChunksParams& p_;
    const int up_;
    ChunkRoom& room_;
    int64_t held_ = 0;
};

__global__ void __launch_bounds__(kSortThreads) choose_items(const __grid_constant__ ChunkArgs args) {
    __shared__ ChunkRoom room;
    Chunks(args, room).run();
}

int64_t place_args(ChunkArgs& args, void* base) {
    const int64_t n = args.p.items, up = args.p.steps > 1 ? args.p.steps - 1 : 0;
    Places places(base);
    args.rises = places.take<Rise>(up * args.p.ladders);
    args.low = places.take<uint8_t>(n);
    args.high = places.take<uint8_t>(n);
    args.middle = places.take<uint8_t>(n);
    args.first = places.take<Keyed>(n * up);
    args.second = places.take<Keyed>(n * up);
    return places.bytes();
}

}  // namespace
}  // namespace kvstrata::cuda

int64_t kvstrata_cuda_choose_chunks_workspace_bytes(const kvstrata::ops::ChooseChunksParams* params) {
    kvstrata::cuda::ChunkArgs args{};
    args.p = *params;
    return kvstrata::cuda::place_args(args, nullptr);
}

int kvstrata_cuda_choose_chunks(const kvstrata::ops::ChooseChunksParams* params, void* stream) {
    using namespace kvstrata::cuda;
    const int64_t steps = static_cast<int64_t>(params->items) * params->steps;
    if (steps > 0x7FFFFFFF) return refused("choose_chunks", "items times steps is not below 2^31");
    ChunkArgs args{};
    args.p = *params;
    place_args(args, params->workspace);
    return launch("choose_chunks", choose_items, dim3(1), dim3(kSortThreads), 0, static_cast<cudaStream_t>(stream),
                  args);
}
