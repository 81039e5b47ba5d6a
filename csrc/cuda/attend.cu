// attend on CUDA: launches, and the merge of partials. The formulas are in ops/attend.h, the walk in attend_walk.cuh.
#include "cuda/api.h"
#include "cuda/attend_launch.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kMergeWarps = 8;

// Sums of p v over the parts that a warp has taken, dims 32 s + lane: of quantized pages, rotated, and of full ones.
template <int Registers>
struct Joined {
    float rotated[Registers], full[Registers], total;
};

// Adds the parts [begin, begin + count) of query row n, count <= 32, several at a time: their reads do not wait for each other.
template <int Registers>
__device__ inline void add_parts(Joined<Registers>& to, const float* workspace, const Partials& partials, int n,
                                 int dim, float maximum, int begin, int count, bool two_kinds) {
    constexpr int kAtOnce = 4;
    const float* const stat = workspace + partials.stat(begin + min(lane(), count - 1), n);
    const float total = lane() < count ? stat[1] : 0.0f;  // 0: nothing was read, and nothing written
    const float weight = total == 0.0f ? 0.0f : weight_of(stat[0], maximum);
    to.total += weight * total;
    for (unsigned left = __ballot_sync(kAllLanes, total != 0.0f); left != 0;) {
        float x[kAtOnce][Registers], weights[kAtOnce];
        bool rotated[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int part = left ? __ffs(static_cast<int>(left)) - 1 : 0;
            weights[i] = __shfl_sync(kAllLanes, weight, part);
            if (!left) weights[i] = 0.0f;
            rotated[i] = two_kinds && (begin + part) % 2 == 0;
            const float* const from = workspace + partials.sums(begin + part, n);
#pragma unroll
            for (int s = 0; s < Registers; ++s)
                x[i][s] = left && s * kWarp + lane() < dim ? from[s * kWarp + lane()] : 0.0f;
            left &= left - 1;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
            for (int s = 0; s < Registers; ++s) {
                if (rotated[i]) to.rotated[s] = fmaf(weights[i], x[i][s], to.rotated[s]);
                if (!rotated[i]) to.full[s] = fmaf(weights[i], x[i][s], to.full[s]);
            }
        }
    }
}

// A block joins the parts of one query row: warps take successive ranges of them, then those in order. Rotated sums are rotated
// back, once. Reads 4 D bytes per part and row: for one quad and D 128 2 KiB per chunk, 1 % of the pages of a bf16 chunk of 32,
// 3 % of an int4 one.
template <int Registers>
__global__ void __launch_bounds__(kMergeWarps* kWarp) merge_partials(const __grid_constant__ AttendArgs args) {
    __shared__ Joined<Registers * kWarp> of_warp[kMergeWarps];
    const ListRow& list = args.batch.rows[blockIdx.y];
    const ops::AttendRow& row = list.row;
    const int n = static_cast<int>(blockIdx.x), rows = row.queries * args.group, dim = args.head_dim;
    if (n >= rows) return;
    const float* const workspace = args.workspace + list.partials;
    const Partials partials = partials_of(rows, row.entries, dim);
    const bool two_kinds = parts_of_chunk(rows) == 2;
    const int parts = __float_as_int(workspace[0]) * parts_of_chunk(rows);

    float maximum = kNothing;
    for (int j = static_cast<int>(threadIdx.x); j < parts; j += kMergeWarps * kWarp)
        maximum = fmaxf(maximum, workspace[partials.stat(j, n)]);
    maximum = block_max(maximum);
    Joined<Registers> mine = {};
    const int each = (parts + kMergeWarps - 1) / kMergeWarps, end = min(parts, (warp() + 1) * each);
    for (int j = warp() * each; j < end; j += kWarp)
        add_parts(mine, workspace, partials, n, dim, maximum, j, min(kWarp, end - j), two_kinds);
    mine.total = warp_sum(mine.total);
#pragma unroll
    for (int s = 0; s < Registers; ++s) {
        of_warp[warp()].rotated[s * kWarp + lane()] = mine.rotated[s];
        of_warp[warp()].full[s * kWarp + lane()] = mine.full[s];
    }
    if (lane() == 0) of_warp[warp()].total = mine.total;
    __syncthreads();
    if (warp() != 0) return;

    Joined<Registers> all = {};
    for (const Joined<Registers* kWarp>& one : of_warp) {
        all.total += one.total;
#pragma unroll
        for (int s = 0; s < Registers; ++s) {
            all.rotated[s] += one.rotated[s * kWarp + lane()];
            all.full[s] += one.full[s * kWarp + lane()];
        }
    }
    if (two_kinds && args.rotation.dim) rotate(all.rotated, args.rotation, true);
    const Result result = finish_row(row, maximum, all.total, n % args.group);
    const int64_t at = out_at(row, args.group, n);
#pragma unroll
    for (int s = 0; s < Registers; ++s) {
        const int d = s * kWarp + lane();
        const float x = (all.full[s] + all.rotated[s]) * result.factor;
        if (d < dim) store_as(args.out_dtype, row.out, at + d, x / result.divisor);
    }
    if (lane() == 0) write_lse(row, args.group, n, result.lse);
}

int query_rows(const ops::AttendParams& p, int r) { return p.rows[r].queries * p.group; }

Width width_of(int rows) { return rows > kFewRows ? Width::team : rows > 4 ? Width::octet : Width::quad; }

// Floats of a row's partials; more query rows never need less.
int64_t partial_floats(int rows, int entries, int head_dim) {
    if (rows == 0) return 0;
    const int few = std::min(rows, kFewRows), some = std::min(rows, kSplitRows);
    return std::max(partials_of(few, entries, head_dim).floats(), partials_of(some, entries, head_dim).floats());
}

int launch_merge(const AttendArgs& args, int most_rows, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(most_rows), static_cast<unsigned>(args.batch.count));
    return with_registers(args.head_dim, [&]<int N>() {
        return launch("attend", merge_partials<N>, grid, kMergeWarps * kWarp, 0, stream, args);
    });
}

int launch_walk(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    if (width == Width::team) {
        if (args.head_dim == 64) return launch_team_64(args, most_rows, chunks, stream);
        if (args.head_dim == 128) return launch_team_128(args, most_rows, chunks, stream);
        return args.head_dim > 256 ? launch_team_wide(args, most_rows, chunks, stream)
                                   : launch_team(args, most_rows, chunks, stream);
    }
    switch (args.head_dim) {
        case 64: return launch_64(width, args, most_rows, chunks, stream);
        case 128: return launch_128(width, args, most_rows, chunks, stream);
        case 256: return launch_256(width, args, most_rows, chunks, stream);
        default:
            return args.head_dim > 128 ? launch_few_wide(args, most_rows, chunks, stream)
                                       : launch_few(width, args, most_rows, chunks, stream);
    }
}

AttendArgs args_of(const ops::AttendParams& p) {
    AttendArgs args{};
    args.pools = pools_of(p.pools);
    args.workspace = static_cast<float*>(p.workspace);
    args.scale = p.scale, args.softcap = p.softcap, args.window = p.window;
    args.group = p.group, args.head_dim = p.head_dim;
    args.q_dtype = p.q_dtype, args.out_dtype = p.out_dtype;
    for (int i = 0; i < kMaxPools; ++i) {
        const PoolView& pool = p.pools[i];
        if (!pool.n_slabs || (!is_full(pool.format) && !quantizable(p.head_dim))) continue;
        args.formats |= 1u << static_cast<int>(pool.format);
        args.staged[static_cast<int>(pool.format)] = staged(pool.format, p.head_dim);
        if (!is_full(pool.format)) args.rotation = rotation(p.head_dim);
    }
    return args;
}

// All rows of one width and kind, in batches.
int attend_rows(const ops::AttendParams& p, AttendArgs& args, Width width, bool split, cudaStream_t stream) {
    int64_t floats = 0;
    int most_rows = 0, chunks = 1;
    const auto flush = [&] {
        if (!args.batch.count) return 0;
        int code = launch_walk(width, args, most_rows, chunks, stream);
        if (!code && split) code = launch_merge(args, most_rows, stream);
        args.batch.count = most_rows = 0, chunks = 1;
        return code;
    };
    for (int r = 0; r < p.n_rows; ++r) {
        const int rows = query_rows(p, r), entries = p.rows[r].entries;
        if (rows && width_of(rows) == width && (rows <= kSplitRows) == split) {
            args.batch.rows[args.batch.count++] = {p.rows[r], floats};
            most_rows = std::max(most_rows, rows);
            if (split) chunks = std::max(chunks, most_chunks(entries));
            if (args.batch.count == RowBatch<ListRow>::kMost)
                if (const int code = flush()) return code;
        }
        floats += partial_floats(rows, entries, p.head_dim);
    }
    return flush();
}

}  // namespace
}  // namespace kvstrata::cuda

int64_t kvstrata_cuda_attend_workspace_bytes(const kvstrata::ops::AttendParams* params) {
    using namespace kvstrata;
    int64_t floats = 0;
    for (int r = 0; r < params->n_rows; ++r)
        floats += cuda::partial_floats(cuda::query_rows(*params, r), params->rows[r].entries, params->head_dim);
    return floats * 4;
}

int kvstrata_cuda_attend(const kvstrata::ops::AttendParams* params, void* stream) {
    using namespace kvstrata;
    using cuda::Width;
    const ops::AttendParams& p = *params;
    if (p.head_dim < 1 || p.head_dim > kMaxHeadDim) return cuda::refused("attend", "head_dim is not in 1..512");
    if (p.q_dtype > DType::f16 || p.out_dtype > DType::f16)
        return cuda::refused("attend", "q or out is not f32, bf16 or f16");
    const auto on = static_cast<cudaStream_t>(stream);
    cuda::AttendArgs args = cuda::args_of(p);
    for (const Width width : {Width::quad, Width::octet, Width::team}) {
        if (const int code = cuda::attend_rows(p, args, width, true, on)) return code;
    }
    return cuda::attend_rows(p, args, Width::team, false, on);
}
