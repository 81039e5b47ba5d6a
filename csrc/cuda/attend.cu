// attend on CUDA: launches, and the merge of partials. The formulas are in ops/attend.h, the walk in attend_walk.cuh.
#include "cuda/api.h"
#include "cuda/attend_finish.cuh"
#include "cuda/attend_pages.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kMergeWarps = 8;

// Part j of a row: its sums count `weight`.
struct Part {
    float maximum, total;
};
__device__ Part part_of(const float* workspace, const Partials& partials, int part, int n) {
    const float* const stat = workspace + partials.stat(part, n);
    return {stat[0], stat[1]};
}

// A block joins the parts of one query row: warps take successive ranges of them, then those in order. Rotated sums are rotated
// back, once. Reads 4 D bytes per part and row: for one quad and D 128 2 KiB per chunk, which is 2 % of a bf16 chunk's pages, 3 %
// of an int4 chunk's.
template <int Registers>
__global__ void __launch_bounds__(kMergeWarps* kWarp) merge_partials(const __grid_constant__ AttendArgs args) {
    __shared__ float sums[kMergeWarps][2][Registers * kWarp];
    __shared__ float totals[kMergeWarps];
    const ops::AttendRow& row = args.batch.rows[blockIdx.y].row;
    const int n = static_cast<int>(blockIdx.x), rows = row.queries * args.group, dim = args.head_dim;
    if (n >= rows) return;
    const float* const workspace = args.workspace + args.batch.rows[blockIdx.y].partials;
    const Partials partials = partials_of(rows, row.entries, dim);
    const int kinds = parts_of_chunk(rows), parts = __float_as_int(workspace[0]) * kinds;

    float maximum = -INFINITY;
    for (int j = lane(); j < parts; j += kWarp) maximum = fmaxf(maximum, part_of(workspace, partials, j, n).maximum);
    maximum = warp_max(maximum);
    float of_kind[2][Registers] = {}, total = 0.0f;
    const int each = (parts + kMergeWarps - 1) / kMergeWarps, end = min(parts, (warp() + 1) * each);
#pragma unroll 2
    for (int j = warp() * each; j < end; ++j) {
        const Part part = part_of(workspace, partials, j, n);
        if (part.total == 0.0f) continue;  // nothing, or nothing written
        const float weight = weight_of(part.maximum, maximum);
        const float* const from = workspace + partials.sums(j, n);
        const bool rotated = kinds == 2 && j % 2 == 0;
        total += weight * part.total;
#pragma unroll
        for (int s = 0; s < Registers; ++s) {
            const float x = s * kWarp + lane() < dim ? from[s * kWarp + lane()] : 0.0f;
            of_kind[0][s] = fmaf(rotated ? weight : 0.0f, rotated ? x : 0.0f, of_kind[0][s]);
            of_kind[1][s] = fmaf(rotated ? 0.0f : weight, rotated ? 0.0f : x, of_kind[1][s]);
        }
    }
#pragma unroll
    for (int s = 0; s < Registers; ++s) {
        sums[warp()][0][s * kWarp + lane()] = of_kind[0][s];
        sums[warp()][1][s * kWarp + lane()] = of_kind[1][s];
    }
    if (lane() == 0) totals[warp()] = total;
    __syncthreads();
    if (warp() != 0) return;
    float x[Registers], rotated[Registers];
    total = 0.0f;
#pragma unroll
    for (int s = 0; s < Registers; ++s) x[s] = rotated[s] = 0.0f;
    for (int w = 0; w < kMergeWarps; ++w) {
        total += totals[w];
#pragma unroll
        for (int s = 0; s < Registers; ++s) {
            rotated[s] += sums[w][0][s * kWarp + lane()];
            x[s] += sums[w][1][s * kWarp + lane()];
        }
    }
    if (kinds == 2 && args.rotation.dim) rotate(rotated, args.rotation, true);
    const int head = n % args.group;
    const Result result = finish_row(row, maximum, total, head);
    const int64_t at = out_at(row, args.group, n);
#pragma unroll
    for (int s = 0; s < Registers; ++s) {
        const int d = s * kWarp + lane();
        if (d < dim) store_as(args.out_dtype, row.out, at + d, (x[s] + rotated[s]) * result.factor / result.divisor);
    }
    if (lane() == 0) write_lse(row, args.group, n, result.lse);
}

int query_rows(const ops::AttendParams& p, int r) { return p.rows[r].queries * p.group; }

Width width_of(int rows, int head_dim) {
    if (rows > kFewRows) return Width::team;
    return rows > 4 && head_dim <= 256 ? Width::octet : Width::quad;
}

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
    if (args.head_dim <= 128) return launch_128(width, args, most_rows, chunks, stream);
    if (args.head_dim <= 256) return launch_256(width, args, most_rows, chunks, stream);
    return launch_512(width, args, most_rows, chunks, stream);
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
        if (rows && width_of(rows, p.head_dim) == width && (rows <= kSplitRows) == split) {
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
