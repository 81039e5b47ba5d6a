// pool on CUDA: each row's visible slots in order of (position, place), then one thread per slot over its neighbours. The formula
// is in ops/pool.h; sums run in order of position, as on the CPU.
//
// Slots are collected in the order of the list. Where a row is one run that is enough: sorting and merging see that and end at
// once. Else parts are sorted in shared memory and merged pairwise. Bound by the launches, and by 8 bytes per slot for each of
// them that does something, then 4 bytes per slot and head.
#include "common/places.h"
#include "cuda/api.h"
#include "cuda/device/page.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/device/warp.cuh"

namespace kvstrata::cuda {
namespace {

#if defined(KVSTRATA_EMULATE)
constexpr int kThreads = 32;  // few, so that tests see rows of many parts
#else
constexpr int kThreads = 512;
#endif
constexpr int kEach = 4;                      // slots of a thread
constexpr int kPart = kThreads * kEach;       // slots that are sorted together
constexpr int kPartEntries = kPart / kSlots;  // as many entries hold at most
constexpr uint64_t kNothing = ~uint64_t{0};   // behind every slot

using PoolRows = RowBatch<ops::PoolRow>;

struct PoolArgs {
    PoolRows batch;
    Pools pools;
    int32_t group, kernel, parts;  // parts of a row, at most
    ops::PoolKind kind;
    ops::PoolDivide divide;
    uint64_t *keys, *spare;  // [R, parts, kPart] slots: position above, as it is ordered without sign, place below
    int32_t* counts;         // [R, parts] visible slots of each part of the list
    int32_t* unordered;      // [R] whether they are not one run

    __device__ int64_t row() const { return batch.first + static_cast<int64_t>(blockIdx.y); }
    __device__ uint64_t* keys_of(uint64_t* all) const { return all + row() * parts * kPart; }
    __device__ const int32_t* counts_of() const { return counts + row() * parts; }
};

__host__ __device__ constexpr int parts_of(int entries) { return (entries + kPartEntries - 1) / kPartEntries; }

__device__ uint64_t key_of(int32_t position, int32_t place) {
    return static_cast<uint64_t>(static_cast<uint32_t>(position) ^ 0x80000000u) << 32 | static_cast<uint32_t>(place);
}
__device__ int64_t position_of(uint64_t key) {
    return static_cast<int32_t>(static_cast<uint32_t>(key >> 32) ^ 0x80000000u);
}
__device__ int place_of(uint64_t key) { return static_cast<int>(static_cast<uint32_t>(key)); }

__device__ uint32_t slots_of(const ops::PoolRow& row, int entry) {
    if (entry >= row.entries || row.pages[entry] < 0) return 0;
    return row.visible ? row.visible[entry] : kAllSlots;
}

// Slots before a part of the list; the whole row's with part = parts_of(entries). The block's first warp, in every lane.
__device__ int slots_before(const int32_t* counts, int part) {
    int n = 0;
    for (int i = lane(); i < part; i += kWarp) n += counts[i];
    return __reduce_add_sync(kAllLanes, n);
}

// The row's slots, in every thread of the block.
__device__ int slots_of_row(const PoolArgs& args) {
    __shared__ int n;
    if (warp() == 0) {
        const int all = slots_before(args.counts_of(), parts_of(args.batch.rows[blockIdx.y].entries));
        if (lane() == 0) n = all;
    }
    __syncthreads();
    return n;
}

__global__ void __launch_bounds__(kThreads) count_slots(const __grid_constant__ PoolArgs args) {
    const ops::PoolRow& row = args.batch.rows[blockIdx.y];
    const int part = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    if (warp() != 0 || part >= parts_of(row.entries)) return;
    int n = 0;
    for (int i = lane(); i < kPartEntries; i += kWarp) n += __popc(slots_of(row, part * kPartEntries + i));
    n = __reduce_add_sync(kAllLanes, n);
    if (thread != 0) return;
    args.counts[args.row() * args.parts + part] = n;
    if (part == 0) args.unordered[args.row()] = 0;
}

// A warp per 32 entries of the part. Hidden slots score 0.
__global__ void __launch_bounds__(kThreads) collect_slots(const __grid_constant__ PoolArgs args) {
    __shared__ int begins[kPartEntries + 1];  // of each entry of the part among the row's slots
    const ops::PoolRow& row = args.batch.rows[blockIdx.y];
    const int part = static_cast<int>(blockIdx.x), first = part * kPartEntries;
    if (part >= parts_of(row.entries)) return;
    if (warp() == 0) {
        int begin = slots_before(args.counts_of(), part);
        for (int from = 0; from < kPartEntries; from += kWarp) {
            const int i = from + lane(), n = i < kPartEntries ? __popc(slots_of(row, first + i)) : 0;
            int upto = n;
            for (int step = 1; step < kWarp; step *= 2) {
                const int other = __shfl_up_sync(kAllLanes, upto, step);
                if (lane() >= step) upto += other;
            }
            if (i < kPartEntries) begins[i] = begin + upto - n;
            begin += __shfl_sync(kAllLanes, upto, kWarp - 1);
        }
    }
    __syncthreads();
    uint64_t* const keys = args.keys_of(args.keys);
    for (int i = static_cast<int>(threadIdx.x); i < kPart; i += kThreads) {
        const int entry = first + i / kSlots, slot = i % kSlots, place = entry * kSlots + slot;
        if (entry >= row.entries) break;
        const uint32_t slots = slots_of(row, entry);
        if (slots >> slot & 1) {
            const int before = __popc(slots & ((1u << slot) - 1));
            keys[begins[i / kSlots] + before] = key_of(positions_at(args.pools, row.pages[entry])[slot], place);
        } else {
            row.out[place] = 0.0f;
        }
    }
}

// A block: a part of the row's slots. All see whether the row is one run.
__global__ void __launch_bounds__(kThreads) look_at_order(const __grid_constant__ PoolArgs args) {
    const int n = slots_of_row(args), first = static_cast<int>(blockIdx.x) * kPart;
    const uint64_t* const keys = args.keys_of(args.keys);
    bool turned = false;
    for (int i = first + static_cast<int>(threadIdx.x); i < min(n, first + kPart); i += kThreads) {
        turned = turned || (i > 0 && keys[i] < keys[i - 1]);
    }
    if (turned) atomicOr(args.unordered + args.row(), 1);
}

// Sorts a part of the row's slots: a bitonic network.
__global__ void __launch_bounds__(kThreads) sort_parts(const __grid_constant__ PoolArgs args) {
    __shared__ uint64_t part[kPart];
    if (!args.unordered[args.row()]) return;
    const int n = slots_of_row(args), first = static_cast<int>(blockIdx.x) * kPart;
    if (first >= n) return;
    uint64_t* const keys = args.keys_of(args.keys) + first;
    const int count = min(kPart, n - first), thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < kPart; i += kThreads) part[i] = i < count ? keys[i] : kNothing;
    for (int run = 2; run <= kPart; run *= 2) {
        for (int step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = thread; i < kPart / 2; i += kThreads) {
                const int low = 2 * i - (i & (step - 1)), high = low + step;
                const uint64_t a = part[low], b = part[high];
                if ((a > b) == ((low & run) != 0)) continue;
                part[low] = b, part[high] = a;
            }
        }
    }
    __syncthreads();
    for (int i = thread; i < count; i += kThreads) keys[i] = part[i];
}

// How many of the first `taken` slots of two runs together are of the first; no two slots are equal.
__device__ int split(const uint64_t* a, int n, const uint64_t* b, int m, int taken) {
    int low = max(0, taken - m), high = min(taken, n);
    while (low < high) {
        const int middle = (low + high) / 2;
        if (a[middle] < b[taken - middle - 1]) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Merges runs of `length` slots pairwise, from one array to the other; a thread writes kEach of them.
__global__ void __launch_bounds__(kThreads)
    merge_runs(const __grid_constant__ PoolArgs args, int length, uint64_t* from, uint64_t* to) {
    if (!args.unordered[args.row()]) return;
    const int n = slots_of_row(args);
    const int at = (static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x)) * kEach;
    if (at >= n) return;
    const int pair = at / length / 2 * 2 * length;  // where the two runs begin
    const uint64_t* const a = args.keys_of(from) + pair;
    const uint64_t* const b = a + length;
    const int of_a = min(length, n - pair), of_b = max(0, min(length, n - pair - length));
    int i = split(a, of_a, b, of_b, at - pair), j = at - pair - i;
    uint64_t* const out = args.keys_of(to) + at;
    for (int k = 0; k < kEach && at + k < n; ++k) {
        const bool first = j >= of_b || (i < of_a && a[i] < b[j]);
        out[k] = first ? a[i++] : b[j++];
    }
}

// The neighbours of slot i in order of position: from where on, and up to where.
struct Near {
    int begin, end;
};
__device__ Near near_to(const uint64_t* keys, int n, int i, int64_t reach) {
    const int64_t here = position_of(keys[i]);
    Near near{i, i + 1};
    while (near.begin > 0 && position_of(keys[near.begin - 1]) >= here - reach) --near.begin;
    while (near.end < n && position_of(keys[near.end]) <= here + reach) ++near.end;
    return near;
}

__global__ void __launch_bounds__(kThreads) pool_slots(const __grid_constant__ PoolArgs args, uint64_t* merged) {
    const ops::PoolRow& row = args.batch.rows[blockIdx.y];
    const int n = slots_of_row(args), first = static_cast<int>(blockIdx.x) * kPart;
    const uint64_t* const keys = args.keys_of(args.unordered[args.row()] ? merged : args.keys);
    for (int i = first + static_cast<int>(threadIdx.x); i < min(n, first + kPart); i += kThreads) {
        const Near near = near_to(keys, n, i, args.kernel / 2);
        const float divisor =
            static_cast<float>(args.divide == ops::PoolDivide::present ? near.end - near.begin : args.kernel);
        float sum = 0.0f;
        for (int g = 0; g < args.group; ++g) {
            const float* const score = row.score + g * row.score_stride_g;
            float pooled = args.kind == ops::PoolKind::max ? score[place_of(keys[i])] : 0.0f;
            for (int j = near.begin; j < near.end; ++j) {
                const float x = score[place_of(keys[j])];
                pooled = args.kind == ops::PoolKind::max ? larger(pooled, x) : pooled + x;
            }
            sum += args.kind == ops::PoolKind::max ? pooled : __fdiv_rn(pooled, divisor);
        }
        row.out[place_of(keys[i])] = __fdiv_rn(sum, static_cast<float>(args.group));
    }
}

void lay_out(const ops::PoolParams& p, Places& places, PoolArgs& args) {
    args.parts = 0;
    for (int r = 0; r < p.n_rows; ++r) {
        const int parts = parts_of(p.rows[r].entries);
        args.parts = args.parts < parts ? parts : args.parts;
    }
    const int64_t parts = static_cast<int64_t>(p.n_rows) * args.parts;
    args.keys = places.take<uint64_t>(parts * kPart);
    args.spare = places.take<uint64_t>(parts * kPart);
    args.counts = places.take<int32_t>(parts);
    args.unordered = places.take<int32_t>(p.n_rows);
}

int pool(const ops::PoolParams& p, cudaStream_t stream) {
    Places places(p.workspace);
    PoolArgs args{};
    lay_out(p, places, args);
    args.pools = pools_of(p.pools);
    args.group = p.group, args.kernel = p.kernel, args.kind = p.kind, args.divide = p.divide;
    if (!args.parts) return 0;
    return in_batches(p.rows, p.n_rows, [&](const PoolRows& rows) {
        args.batch = rows;
        const dim3 grid(static_cast<unsigned>(args.parts), static_cast<unsigned>(rows.count));
        for (const auto kernel : {count_slots, collect_slots, look_at_order, sort_parts}) {
            if (const int code = launch("pool", kernel, grid, kThreads, 0, stream, args)) return code;
        }
        uint64_t *from = args.keys, *to = args.spare;
        for (int64_t length = kPart; length < int64_t{args.parts} * kPart; length *= 2) {
            const int code =
                launch("pool", merge_runs, grid, kThreads, 0, stream, args, static_cast<int>(length), from, to);
            if (code) return code;
            uint64_t* const merged = to;
            to = from, from = merged;
        }
        return launch("pool", pool_slots, grid, kThreads, 0, stream, args, from);
    });
}

}  // namespace
}  // namespace kvstrata::cuda

int64_t kvstrata_cuda_pool_workspace_bytes(const kvstrata::ops::PoolParams* params) {
    kvstrata::Places none(nullptr);
    kvstrata::cuda::PoolArgs unused{};
    kvstrata::cuda::lay_out(*params, none, unused);
    return none.bytes();
}

int kvstrata_cuda_pool(const kvstrata::ops::PoolParams* params, void* stream) {
    return kvstrata::cuda::pool(*params, static_cast<cudaStream_t>(stream));
}
