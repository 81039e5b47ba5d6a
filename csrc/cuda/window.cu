// Window queries: their operands, and the pass over the pages that finds their log-sum-exps. See window.cuh.
#include "cuda/window_logits.cuh"

namespace kvstrata::cuda {
namespace {

// --- Operands --------------------------------------------------------------------------------------------------------

constexpr float kMostCode = 32639.0f;             // 127 * 257: two signed bytes hold it
constexpr float kLeast = 7.888609052210118e-31f;  // 2^-100: a smaller query is zeros

struct OperandArgs {
    WindowRows batch;
    Operands operands;
    Rotation rotation;
    int32_t group, dim;
    DType dtype;
};

__device__ float element_at(const void* at, DType dtype, int64_t i) {
    if (dtype == DType::bf16) return load_element(static_cast<const __nv_bfloat16*>(at) + i);
    if (dtype == DType::f16) return load_element(static_cast<const __half*>(at) + i);
    return load_element(static_cast<const float*>(at) + i);
}

// Where a query's words lie: column `query` of a tile.
struct Column {
    int64_t tile;  // of all rows'
    int query;
};

template <int N>
__device__ void put_floats(const float (&x)[N], int dim, Column to, uint32_t* words) {
    words += to.tile * tile_words(kF32, dim, 1) + to.query;
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const int d = s * kWarp + lane();
        if (d < dim) words[d * kColumns] = __float_as_uint(x[s]);
    }
}

// The word of two dims from dim d on, an even one, under one term.
__device__ int half_word(int d) {
    const int step = d / 16, two = d % 16 / 2;
    return (step / 2 * kWarp + two % 4) * 4 + step % 2 * 2 + two / 4;
}

template <Format F>
__device__ float rounded(float x) {
    if constexpr (F == Format::bf16) return from_bf16(to_bf16(x));
    return __half2float(__float2half_rn(x));
}

template <Format F, int N>
__device__ void put_halves(const float (&x)[N], int dim, int terms, Column to, uint32_t* words) {
    const int64_t term_words = step_pairs(dim) * kWarp * 4;
    words += to.tile * terms * term_words + to.query * 16;
    float rest[N];
#pragma unroll
    for (int s = 0; s < N; ++s) rest[s] = x[s];
    for (int term = 0; term < terms; ++term, words += term_words) {
#pragma unroll
        for (int s = 0; s < N; ++s) {
            if (s * kWarp >= dim) break;
            const float held = rounded<F>(rest[s]), next = __shfl_down_sync(kAllLanes, held, 1);
            rest[s] = isfinite(held) ? rest[s] - held : 0.0f;
            if (lane() % 2) continue;
            words[half_word(s * kWarp + lane())] = F == Format::bf16 ? pack_bf16(held, next) : pack_f16(held, next);
        }
    }
}

// A power of two that takes the largest of a query's finite elements to 2^14 and above, so that f16 holds them all as well.
template <int N>
__device__ float f16_factor(const float (&x)[N]) {
    float most = 0.0f;
#pragma unroll
    for (int s = 0; s < N; ++s) most = isfinite(x[s]) ? fmaxf(most, fabsf(x[s])) : most;
    const int exponent = static_cast<int>(__float_as_uint(warp_max(most)) >> 23) - 127;
    return __uint_as_float(static_cast<uint32_t>(min(127, max(-126, 14 - max(exponent, -100))) + 127) << 23);
}

// q . centre in the CPU's order: sixteen sums over d % 16, then those one after the other.
template <int N>
__device__ float centre_product(const float (&x)[N], int dim, const float* centre) {
    if (centre == nullptr) return 0.0f;
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const int d = s * kWarp + lane();
        const float own = d < dim ? x[s] * centre[d] : 0.0f, other = __shfl_xor_sync(kAllLanes, own, 16);
        if (s * kWarp < dim) sum += lane() < 16 ? own : other;
        if (s * kWarp + 16 < dim) sum += lane() < 16 ? other : own;
    }
    float total = 0.0f;
    for (int i = 0; i < 16; ++i) total += __shfl_sync(kAllLanes, sum, i);
    return total;
}

// Four lanes' bytes as a word, in each of them.
__device__ uint32_t word_of(int byte) {
    uint32_t word = static_cast<uint32_t>(byte & 0xFF) << 8 * (lane() % 4);
    word |= __shfl_xor_sync(kAllLanes, word, 1);
    return word | __shfl_xor_sync(kAllLanes, word, 2);
}

// Of R q, in place of q; returns delta. As cpu/kernels/attend_quantized.cpp has it.
template <int N>
__device__ float put_codes(float (&x)[N], const Rotation& rotation, Column to, uint32_t* words) {
    const int dim = rotation.dim;
    rotate(x, rotation, false);
    float most = 0.0f;
    bool finite = true;
#pragma unroll
    for (int s = 0; s < N; ++s) finite = finite && isfinite(x[s]), most = fmaxf(most, fabsf(x[s]));
    finite = __all_sync(kAllLanes, finite);
    most = warp_max(most);
    const bool plain = finite && most >= kLeast;
    const float inverse = plain ? __fdiv_rn(kMostCode, most) : 0.0f;
    words += to.tile * tile_words(kCodes, dim, 1) + to.query * 16;
#pragma unroll
    for (int s = 0; s < N; ++s) {
        if (s * kWarp >= dim) break;
        const int n = plain ? __float2int_rn(x[s] * inverse) : 0, low = static_cast<int8_t>(n);
        const uint32_t high_word = word_of((n - low) >> 8), low_word = word_of(low);
        const int unit = 2 * s + lane() / 16;
        uint32_t* const at = words + (s * kWarp + lane() % 16 / 4) * 4 + unit % 2 * 2;
        if (lane() % 4 == 0) at[0] = high_word;
        if (lane() % 4 == 1) at[1] = low_word;
    }
    if (!finite) return NAN;
    return plain ? __fdiv_rn(most, kMostCode) : 0.0f;
}

// One warp per query.
template <int N>
__global__ void __launch_bounds__(kUnitThreads) put_operands(const __grid_constant__ OperandArgs args) {
    const ops::WindowRow& row = args.batch.rows[blockIdx.y];
    const int i = static_cast<int>(blockIdx.x) * kUnitWarps + warp(), tiles = tiles_of(row.queries);
    if (i >= args.group * row.queries) return;
    const Operands& o = args.operands;
    const int g = i / row.queries, t = i % row.queries;
    const int64_t r = args.batch.first + static_cast<int64_t>(blockIdx.y);
    const Column to{r * o.tiles + g * tiles + t / kColumns, t % kColumns};
    const int64_t from = (row.tokens ? row.tokens[t] : t) * row.q_stride_t + g * row.q_stride_g;
    float x[N];
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const int d = s * kWarp + lane();
        x[s] = d < args.dim ? element_at(row.q, args.dtype, from + d) : 0.0f;
    }
    if (o.words[kF32]) put_floats(x, args.dim, to, o.words[kF32]);
    if (o.words[kBf16]) put_halves<Format::bf16>(x, args.dim, o.terms[kBf16], to, o.words[kBf16]);
    if (o.words[kF16]) {
        const float factor = args.dtype == DType::f16 ? 1.0f : f16_factor(x);
        float scaled[N];
#pragma unroll
        for (int s = 0; s < N; ++s) scaled[s] = x[s] * factor;
        put_halves<Format::f16>(scaled, args.dim, o.terms[kF16], to, o.words[kF16]);
        if (lane() == 0) o.unscale[to.tile * kColumns + to.query] = __fdiv_rn(1.0f, factor);
    }
    if (o.words[kCodes]) {
        const float centre = centre_product(x, args.dim, row.centre),
                    delta = put_codes(x, args.rotation, to, o.words[kCodes]);
        if (lane() == 0) o.factors[to.tile * kColumns + to.query] = {delta, centre};
    }
}

// --- Log-sum-exps ----------------------------------------------------------------------------------------------------

// A running log-sum-exp: sum of exp(z - most), most -inf before the first.
struct Running {
    float most, sum;
};
__device__ float reference_of(float most) { return most == -INFINITY ? 0.0f : most; }

__device__ Running joined(Running x, Running y) {
    const float most = fmaxf(x.most, y.most), reference = reference_of(most);
    return {most, x.sum * exp_(x.most - reference) + y.sum * exp_(y.most - reference)};
}

__device__ float value_of(Running x) { return x.sum == 0.0f ? -INFINITY : x.most + logf(x.sum); }

// Four more logits.
__device__ void add(Running& x, float a, float b, float c, float d) {
    const float most = fmaxf(x.most, fmaxf(fmaxf(a, b), fmaxf(c, d)));  // passes over NaN, which shows in the sum
    if (most > x.most) {
        x.sum *= exp_(x.most - most);
        x.most = most;
    }
    const float reference = reference_of(x.most);
    x.sum += (exp_(a - reference) + exp_(b - reference)) + (exp_(c - reference) + exp_(d - reference));
}

struct LseArgs {
    WindowRows batch;
    WindowCall call;
    Past past;
};

// Of the two queries of a lane.
using TwoRunning = float4;
__device__ Running first_of(const TwoRunning& x) { return {x.x, x.y}; }
__device__ Running second_of(const TwoRunning& x) { return {x.z, x.w}; }
__device__ TwoRunning two_of(Running a, Running b) { return {a.most, a.sum, b.most, b.sum}; }

// Over the lanes of a query.
__device__ Running joined_lanes(Running x) {
#pragma unroll
    for (int step = 4; step < kWarp; step *= 2) {
        x = joined(x, {__shfl_xor_sync(kAllLanes, x.most, step), __shfl_xor_sync(kAllLanes, x.sum, step)});
    }
    return x;
}

// A block: one chunk of a row's entries under up to kBlockTiles tiles. Every lane has sums of its own for its two queries of each
// tile; they are joined in the order of warps, then of lanes.
__global__ void __launch_bounds__(kUnitThreads, kUnitsPerSm) sum_units(const __grid_constant__ LseArgs args) {
    __shared__ UnitPages pages;
    __shared__ TwoRunning sums[kUnitWarps][kBlockTiles][kWarp];
    const WindowCall& call = args.call;
    const ops::WindowRow& row = args.batch.rows[blockIdx.y];
    const int chunk = static_cast<int>(blockIdx.x) % call.chunks;
    const int begin = static_cast<int>(blockIdx.x) / call.chunks * kBlockTiles, of_head = tiles_of(row.queries);
    const int end = min(call.group * of_head, begin + kBlockTiles);
    if (chunk * kUnitEntries >= row.entries || begin >= end) return;
    const int64_t r = args.batch.first + static_cast<int64_t>(blockIdx.y);
    if (warp() == 0) find_pages(pages, call.pools, row, call.head_dim, chunk, args.past, call.window);
    for (TwoRunning(&tile)[kWarp] : sums[warp()]) tile[lane()] = {-INFINITY, 0.0f, -INFINITY, 0.0f};
    __syncthreads();
    for (int i = warp(); i < pages.count; i += kUnitWarps) {
        fetch_ahead(pages, i + kUnitWarps, call.head_dim);
        for (int first = begin; first < end; first += kGroupTiles) {
            const TileGroup tiles = successive(r * call.operands.tiles, first, end);
            Logits z;
            find_logits(pages.pairs[i], call.operands, tiles, call.head_dim, call.scale, call.softcap, z);
            hide_unread(pages.pairs[i], row, tiles, of_head, call.window, z);
#pragma unroll
            for (int j = 0; j < kGroupTiles; ++j) {
                if (j >= tiles.count) break;
                TwoRunning& own = sums[warp()][first - begin + j][lane()];
                Running a = first_of(own), b = second_of(own);
                add(a, z[0][j][0], z[0][j][2], z[1][j][0], z[1][j][2]);
                add(b, z[0][j][1], z[0][j][3], z[1][j][1], z[1][j][3]);
                own = two_of(a, b);
            }
        }
    }
    __syncthreads();
    for (int i = warp(); i < end - begin; i += kUnitWarps) {
        Running a = first_of(sums[0][i][lane()]), b = second_of(sums[0][i][lane()]);
        for (int w = 1; w < kUnitWarps; ++w) {
            a = joined(a, first_of(sums[w][i][lane()])), b = joined(b, second_of(sums[w][i][lane()]));
        }
        a = joined_lanes(a), b = joined_lanes(b);
        const int g = (begin + i) / of_head, t = (begin + i) % of_head * kColumns + 2 * query_lane();
        float* const out = call.partial(r, chunk, g) + t;
        if (slot_lane() == 0 && t < row.queries) out[0] = value_of(a);
        if (slot_lane() == 0 && t + 1 < row.queries) out[1] = value_of(b);
    }
}

struct MergeArgs {
    WindowRows batch;
    WindowCall call;
    bool sinks;
    LseOut out;
};

// A block: 32 queries of a row; warp w has units w, w + 8, ..., so that bits do not depend on how many follow.
constexpr int kMergeWarps = 8;

__global__ void __launch_bounds__(kMergeWarps* kWarp) merge_units(const __grid_constant__ MergeArgs args) {
    __shared__ float parts[kMergeWarps][kWarp];
    const WindowCall& call = args.call;
    const ops::WindowRow& row = args.batch.rows[blockIdx.y];
    const int i = static_cast<int>(blockIdx.x) * kWarp + lane(), chunks = chunks_of(row.entries);
    const bool real = i < call.group * row.queries;
    const int64_t r = args.batch.first + static_cast<int64_t>(blockIdx.y);
    const int g = real ? i / row.queries : 0, t = real ? i % row.queries : 0;
    const float sink = real && args.sinks && row.sinks ? row.sinks[g] : -INFINITY;
    float most = sink;
    for (int u = warp(); real && u < chunks; u += kMergeWarps) most = larger(most, call.partial(r, u, g)[t]);
    parts[warp()][lane()] = most;
    __syncthreads();
    for (int w = 0; w < kMergeWarps; ++w) most = larger(parts[w][lane()], most);
    __syncthreads();
    float total = 0.0f;
    const float reference = reference_of(most);
    for (int u = warp(); real && u < chunks; u += kMergeWarps) total += exp_(call.partial(r, u, g)[t] - reference);
    parts[warp()][lane()] = total;
    __syncthreads();
    if (!real || warp() != 0) return;
    total = exp_(sink - reference);
    for (int w = 0; w < kMergeWarps; ++w) total += parts[w][lane()];
    const float lse = most == -INFINITY ? most : most + logf(total);
    call.lse_of(r, g)[t] = lse;
    if (args.out.at) args.out.at[r * args.out.stride_r + g * args.out.stride_g + t] = lse;
}

}  // namespace

Operands lay_out_operands(const ops::WindowParams& p, int tiles, Places& places) {
    Operands o{};
    o.tiles = tiles;
    const int64_t all = static_cast<int64_t>(p.n_rows) * tiles;
    for (int kind = 0; kind < kOperandKinds; ++kind) {
        o.terms[kind] = terms_of(static_cast<OperandKind>(kind), p.pools ? p.q_dtype : DType::f32);
        bool needed = !p.pools;
        for (int i = 0; p.pools && i < kMaxPools; ++i) {
            needed = needed || (p.pools[i].n_slabs && operand_of(p.pools[i].format) == kind);
        }
        if (!needed) continue;
        o.words[kind] =
            places.take<uint32_t>(all * tile_words(static_cast<OperandKind>(kind), p.head_dim, o.terms[kind]));
        if (kind == kF16) o.unscale = places.take<float>(all * kColumns);
        if (kind == kCodes) o.factors = places.take<float2>(all * kColumns);
    }
    return o;
}

int fill_operands(const char* op, const WindowRows& rows, const ops::WindowParams& p, const Operands& operands,
                  cudaStream_t stream) {
    int most = 0;
    for (int i = 0; i < rows.count; ++i) most = most < rows.rows[i].queries ? rows.rows[i].queries : most;
    if (!most) return 0;

    const OperandArgs args{rows, operands, rotation(p.head_dim), p.group, p.head_dim, p.q_dtype};
    const dim3 grid(blocks_for(int64_t{p.group} * most, kUnitWarps), static_cast<unsigned>(rows.count));
    return with_registers(p.head_dim,
                          [&]<int N>() { return launch(op, put_operands<N>, grid, kUnitThreads, 0, stream, args); });
}

WindowCall lay_out_window(const ops::WindowParams& p, bool count_past, Places& places) {
    WindowCall call{};
    for (int r = 0; r < p.n_rows; ++r) {
        const int chunks = chunks_of(p.rows[r].entries);
        call.queries = call.queries < p.rows[r].queries ? p.rows[r].queries : call.queries;
        call.chunks = call.chunks < chunks ? chunks : call.chunks;
    }
    if (p.pools) call.pools = pools_of(p.pools);
    call.operands = lay_out_operands(p, p.group * tiles_of(call.queries), places);
    const int64_t heads = static_cast<int64_t>(p.n_rows) * p.group;
    call.partials = places.take<float>(heads * call.chunks * call.queries);
    call.lse = places.take<float>(heads * call.queries);
    if (count_past) call.past = places.take<int32_t>(static_cast<int64_t>(p.n_rows) * call.chunks);
    call.group = p.group, call.head_dim = p.head_dim, call.window = p.window;
    call.scale = p.scale, call.softcap = p.softcap;
    return call;
}

int find_lse(const char* op, const WindowRows& rows, const WindowCall& call, Past past, bool sinks, LseOut out,
             cudaStream_t stream) {
    if (!call.queries) return 0;
    const auto count = static_cast<unsigned>(rows.count);
    const unsigned blocks = blocks_for(call.operands.tiles, kBlockTiles) * static_cast<unsigned>(call.chunks);
    if (blocks) {
        const LseArgs args{rows, call, past};
        if (const int code = launch(op, sum_units, dim3(blocks, count), kUnitThreads, 0, stream, args)) return code;
    }
    const MergeArgs args{rows, call, sinks, out};
    const dim3 grid(blocks_for(int64_t{call.group} * call.queries, kWarp), count);
    return launch(op, merge_units, grid, kMergeWarps * kWarp, 0, stream, args);
}

}  // namespace kvstrata::cuda
