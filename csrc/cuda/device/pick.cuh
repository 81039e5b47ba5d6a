// The second half of select: from x of all entries of a row to the entries that it reads (ops/score_pages.h).
#pragma once

#include "common/layout.h"
#include "cuda/device/math.cuh"
#include "cuda/device/ranks.cuh"
#include "cuda/device/rows.cuh"
#include "ops/score_pages.h"
#include "ops/supported.h"

namespace kvstrata::cuda {
namespace {

constexpr int kPickThreads = 512;
constexpr int kNoEntry = 0x7FFFFFFF;
constexpr float kHidden = -1.0f;  // the vote of what is hidden; others are 0 or more

__host__ __device__ constexpr int summary_blocks(int entries) { return (entries + kSlots - 1) / kSlots; }

// What a row works in, M padded to 16.
struct PickScratch {
    float* x;        // [G, M]; once the votes are counted, e to the x less the head's largest
    float* vote;     // [M]
    uint64_t* keys;  // [2, M]
    int32_t* bad;    // [spans] the first entry of a span that cannot be ranked, or kNoEntry
};

struct PickRow {
    ops::SelectRow row;
    PickScratch scratch;
};

struct PickArgs {
    RowBatch<PickRow> batch;
    int32_t group, head_dim, span, least;  // span: blocks of summaries
    float mass;
    bool sum, choose;  // choose: not only whether all can be ranked
};

// Of one row, by one block of threads.
class Pick {
  public:
    __device__ Pick(const PickArgs& args, const PickRow& work, RankRoom& room, float* facts)
        : a_(args),
          row_(work.row),
          w_(work.scratch),
          n_(work.row.entries),
          stride_(static_cast<int64_t>(summary_blocks(work.row.entries)) * kSlots),
          room_(room),
          largest_(facts),
          share_(facts + ops::kMaxGroup),
          outside_(facts + 2 * ops::kMaxGroup),
          parts_(facts + 3 * ops::kMaxGroup) {}

    __device__ void run() {
        const int bad = first_bad();
        if (!a_.choose || bad != kNoEntry) {
            if (threadIdx.x == 0 && row_.found) {
                row_.found[0] = row_.found[2] = 0;
                row_.found[1] = bad == kNoEntry ? -1 : bad;
            }
            if (a_.choose) leave_empty();
            return;
        }
        vote();
        const int count = pick();
        const int zone_count = row_.zone ? fill_zone() : 0;
        if (row_.lse_rest) rest();
        if (threadIdx.x == 0 && row_.found) row_.found[0] = count, row_.found[1] = -1, row_.found[2] = zone_count;
    }

  private:
    __device__ float* x_of(int g) const { return w_.x + g * stride_; }

    __device__ int first_bad() {
        const int spans = (summary_blocks(n_) + a_.span - 1) / a_.span;
        int bad = kNoEntry;
        for (int s = lane(); s < spans; s += kWarp) bad = min(bad, w_.bad[s]);
        return __reduce_min_sync(kAllLanes, bad);
    }

    // A row that cannot be ranked selects nothing.
    __device__ void leave_empty() {
        for (int i = thread(); i < row_.most && row_.selected; i += threads()) row_.selected[i] = -1;
        for (int i = thread(); i < row_.zone_most && row_.zone; i += threads()) row_.zone[i] = -1;
        for (int g = thread(); g < a_.group && row_.lse_rest; g += threads()) row_.lse_rest[g] = NAN;
    }

    // Each head's largest x, its entries as parts of that, and what of a head's mass one part is; then the votes.
    __device__ void vote() {
        const Segment mine(n_);
        for (int g = 0; g < a_.group; ++g) {
            float most = -INFINITY;
            each_of_warp(mine, [&](int e, bool inside) { most = inside ? fmaxf(most, x_of(g)[e]) : most; });
            most = warp_max(most);
            if (lane() == 0) parts_[warp() * ops::kMaxGroup + g] = most;
        }
        __syncthreads();
        for (int g = thread(); g < a_.group; g += threads()) {
            float most = -INFINITY;
            for (int w = 0; w < warps(); ++w) most = fmaxf(most, parts_[w * ops::kMaxGroup + g]);
            largest_[g] = most;
        }
        __syncthreads();
        for (int g = 0; g < a_.group; ++g) {
            const float most = largest_[g];
            float total = 0.0f;
            each_of_warp(mine, [&](int e, bool inside) {
                if (!inside) return;
                const float part = most == -INFINITY ? 0.0f : exp_(x_of(g)[e] - most);
                x_of(g)[e] = part;
                total += part;
            });
            keep_part(g, total);
        }
        __syncthreads();
        for (int g = thread(); g < a_.group; g += threads()) {
            const float base = row_.lse_base ? row_.lse_base[g] : -INFINITY;
            share_[g] = outside_[g] = 0.0f;
            if (largest_[g] == -INFINITY) continue;
            const float outside = expf(base - largest_[g]);  // may be inf: then nothing here counts
            const float all = sum_of_parts(g) + outside;
            if (all > 0.0f) share_[g] = __fdiv_rn(1.0f, all);
            outside_[g] = isinf(outside) ? 1.0f : outside * share_[g];
        }
        __syncthreads();
        each_of_warp(mine, [&](int e, bool inside) {
            if (!inside) return;
            float total = 0.0f;
            for (int g = 0; g < a_.group; ++g) {
                const float part = x_of(g)[e];
                total = a_.sum ? fmaf(share_[g], part, total) : fmaxf(part * share_[g], total);
            }
            w_.vote[e] = e >= row_.first && row_.visible[e] ? total : kHidden;
        });
        __syncthreads();
    }

    // Larger for a higher vote, and of equal ones for the lower index; 0 for what is hidden.
    __device__ uint64_t key(int e) const {
        const float vote = w_.vote[e];
        if (!(vote >= 0.0f)) return 0;
        return static_cast<uint64_t>(__float_as_uint(vote)) << 32 | ~static_cast<uint32_t>(e);
    }
    __device__ bool selected(int e) const { return key(e) >= least_; }

    // Sets what a selected entry has at least as its key.
    __device__ int pick() {
        least_ = ~uint64_t{0};
        if (!row_.selected || row_.most == 0) return 0;
        const int there = count_of(n_, room_.warps, [&](int e) { return key(e) != 0; });
        int count = min(there, row_.most);
        if (count == there) {
            least_ = 1;
        } else {
            least_ = nth_largest(n_, count, room_, [&](int e) { return key(e); }).key;
        }
        if (a_.mass > 0.0f) count = enough(count);
        place_in_order(n_, room_.warps, [&](int e) { return selected(e); }, [&](int i, int e) { put(i, e); });
        for (int i = count + thread(); i < row_.most; i += threads()) row_.selected[i] = -1;
        return count;
    }

    __device__ void put(int i, int e) {
        row_.selected[i] = e;
        if (row_.votes) row_.votes[i] = w_.vote[e];
        for (int g = 0; row_.selected_x && g < a_.group; ++g) {
            row_.selected_x[static_cast<int64_t>(g) * row_.most + i] = log_of(g, x_of(g)[e]);
        }
    }

    // Once the votes are counted, x stands as its part of a head's largest.
    __device__ float log_of(int g, float part) const { return part > 0.0f ? largest_[g] + logf(part) : -INFINITY; }

    // How many of the n best, in falling order, reach the mass. Their order is found by counting: they are few.
    __device__ int enough(int n) {
        uint64_t* const some = w_.keys;
        uint64_t* const sorted = w_.keys + stride_;
        place_in_order(n_, room_.warps, [&](int e) { return selected(e); }, [&](int i, int e) { some[i] = key(e); });
        for (int i = thread(); i < n; i += threads()) {
            int above = 0;
            for (int j = 0; j < n; ++j) above += some[j] > some[i];
            sorted[above] = some[i];
        }
        __syncthreads();
        const float wanted = a_.mass * static_cast<float>(a_.group);
        float held = 0.0f;
        for (int g = 0; g < a_.group; ++g) held += outside_[g];
        for (int from = 0; from < n; from += kWarp) {  // every warp alike
            const int i = from + lane();
            const float mine = i < n ? __uint_as_float(static_cast<uint32_t>(sorted[i] >> 32)) : 0.0f;
            for (int j = 0; j < kWarp && from + j < n; ++j) {
                if (from + j >= a_.least && held >= wanted) return cut(from + j, sorted);
                held += __shfl_sync(kAllLanes, mine, j);
            }
        }
        return n;
    }
    __device__ int cut(int count, const uint64_t* sorted) {
        least_ = count > 0 ? sorted[count - 1] : ~uint64_t{0};
        return count;
    }

    // Not selected, and its value mean tells of no hidden slot.
    __device__ uint64_t zone_key(int e) const {
        const uint64_t mine = key(e);
        if (mine == 0 || mine >= least_) return 0;
        const unsigned char* const slots = row_.blocks[e / kSlots] + value_slots_offset(a_.head_dim);
        return reinterpret_cast<const uint32_t*>(slots)[e % kSlots] == row_.visible[e] ? mine : 0;
    }

    __device__ int fill_zone() {
        const int there = count_of(n_, room_.warps, [&](int e) { return zone_key(e) != 0; });
        const int count = min(there, row_.zone_most);
        uint64_t least = 1;
        if (count > 0 && count < there) {
            least = nth_largest(n_, count, room_, [&](int e) { return zone_key(e); }).key;
        }
        if (count > 0) {
            place_in_order(
                n_, room_.warps, [&](int e) { return zone_key(e) >= least; }, [&](int i, int e) { row_.zone[i] = e; });
        }
        for (int i = count + thread(); i < row_.zone_most; i += threads()) row_.zone[i] = -1;
        return count;
    }

    __device__ void rest() {
        for (int g = 0; g < a_.group; ++g) {
            float total = 0.0f;
            each_of_warp(Segment(n_), [&](int e, bool inside) { total += inside && !selected(e) ? x_of(g)[e] : 0.0f; });
            keep_part(g, total);
        }
        __syncthreads();
        for (int g = thread(); g < a_.group; g += threads()) row_.lse_rest[g] = log_of(g, sum_of_parts(g));
    }

    __device__ void keep_part(int g, float total) {
        total = warp_sum(total);
        if (lane() == 0) parts_[warp() * ops::kMaxGroup + g] = total;
    }
    __device__ float sum_of_parts(int g) const {
        float total = 0.0f;
        for (int w = 0; w < warps(); ++w) total += parts_[w * ops::kMaxGroup + g];
        return total;
    }

    __device__ static int thread() { return static_cast<int>(threadIdx.x); }
    __device__ static int threads() { return static_cast<int>(blockDim.x); }

    const PickArgs& a_;
    const ops::SelectRow& row_;
    const PickScratch& w_;
    const int n_;
    const int64_t stride_;
    RankRoom& room_;
    float *largest_, *share_, *outside_, *parts_;  // by head; parts_ [warps, heads]
    uint64_t least_ = 0;
};

__global__ void __launch_bounds__(kPickThreads) pick_pages(const __grid_constant__ PickArgs args) {
    __shared__ RankRoom room;
    __shared__ float facts[(3 + kPickThreads / kWarp) * ops::kMaxGroup];
    Pick(args, args.batch.rows[blockIdx.x], room, facts).run();
}

}  // namespace
}  // namespace kvstrata::cuda
