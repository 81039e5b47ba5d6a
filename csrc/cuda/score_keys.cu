// score_keys on CUDA: one warp per page, whose lines lie across it: lane 4 l + s has slots 4 s to 4 s + 3 of lines l, 8 + l, ...,
// 16 bytes at a time. The formulas are in ops/score_keys.h.
//
// norm reads K once. diversity reads it twice from memory: for sizes and directions, and for the angles to the anchor. Both are
// bound by it, at about 200 lane instructions per page of 16-bit keys and D = 128.
#include "common/places.h"
#include "cuda/api.h"
#include "cuda/device/page.cuh"
#include "cuda/device/rotate.cuh"
#include "cuda/device/rows.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kUnitEntries = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kLines = kWarp / 4;            // of K that a warp reads at once
constexpr int kQuad = 4;                     // slots of a lane
enum Domain { kPlain, kRotated, kDomains };  // of full pages; of quantized pages

struct KeysArgs {
    RowBatch<ops::KeysRow> batch;
    Pools pools;
    int32_t head_dim, stride, chunks;  // stride: D, padded; chunks of a row, at most
    float* centres;                    // [R, stride] rotated
    float* parts;                      // [R, chunks, kDomains, stride] sums of directions
    float* anchors;                    // [R, kDomains, stride]

    __device__ int64_t row() const { return batch.first + static_cast<int64_t>(blockIdx.y); }
    __device__ float* part(int64_t row, int chunk) const { return parts + (row * chunks + chunk) * kDomains * stride; }
    __device__ float* anchor(int64_t row) const { return anchors + row * kDomains * stride; }
};

__host__ __device__ constexpr int chunks_of(int entries) { return (entries + kUnitEntries - 1) / kUnitEntries; }

// --- Keys of a page --------------------------------------------------------------------------------------------------

struct KeysPage {
    const unsigned char* data;
    const float* centre;  // [D] rotated, or null
    Format format;
    int group;
    uint32_t slots;
};

// visit(d, k) for the lane's dims: k [kQuad] of its slots, those of quantized pages in the rotated domain plus the centre.
template <Format F, class Visit>
__device__ __forceinline__ void each_key(const KeysPage& page, int head_dim, Visit visit) {
    constexpr int kDims = 32 / format_bits(F);  // of a word
    const int quad = lane() % 4;
    const auto* const words = reinterpret_cast<const uint4*>(page.data);
#pragma unroll 2
    for (int line = lane() / 4; line < key_words(F, head_dim); line += kLines) {
        const uint4 four = __ldg(words + line * (kSlots / kQuad) + quad);
        const uint32_t word[kQuad] = {four.x, four.y, four.z, four.w};
        float scale[kQuad] = {};
        if constexpr (!is_full(F)) {
            const auto* const scales = reinterpret_cast<const uint2*>(key_scales(page.data, F, head_dim));
            const uint2 two = __ldg(scales + line * kDims / page.group * (kSlots / kQuad) + quad);
            scale[0] = __uint_as_float(two.x << 16), scale[1] = __uint_as_float(two.x & 0xFFFF0000u);
            scale[2] = __uint_as_float(two.y << 16), scale[3] = __uint_as_float(two.y & 0xFFFF0000u);
        }
#pragma unroll
        for (int i = 0; i < kDims; ++i) {
            const int d = line * kDims + i, bit = field_of<F>(i).bit;
            if (is_full(F) && d >= head_dim) continue;
            float k[kQuad];
#pragma unroll
            for (int s = 0; s < kQuad; ++s) {
                if constexpr (is_full(F)) {
                    k[s] = element_in<F>(word[s], bit);
                } else {
                    const float level = static_cast<float>(level_of<F>(code_in<F>(word[s], bit)));
                    k[s] = page.centre ? fmaf(scale[s], level, page.centre[d]) : scale[s] * level;
                }
            }
            visit(d, k);
        }
    }
}

template <class Visit>
__device__ __forceinline__ void each_key(const KeysPage& page, int head_dim, Visit visit) {
    switch (page.format) {
        case Format::f32: return each_key<Format::f32>(page, head_dim, visit);
        case Format::bf16: return each_key<Format::bf16>(page, head_dim, visit);
        case Format::f16: return each_key<Format::f16>(page, head_dim, visit);
        case Format::int8: return each_key<Format::int8>(page, head_dim, visit);
        case Format::int4: return each_key<Format::int4>(page, head_dim, visit);
        default: return each_key<Format::int2>(page, head_dim, visit);
    }
}

// Sums of the lines' lanes, in each of them.
__device__ void add_lines(float (&x)[kQuad]) {
#pragma unroll
    for (int step = 4; step < kWarp; step *= 2) {
#pragma unroll
        for (int s = 0; s < kQuad; ++s) x[s] += __shfl_xor_sync(kAllLanes, x[s], step);
    }
}

// |k| of a lane's slots.
__device__ void find_sizes(const KeysPage& page, int head_dim, float (&size)[kQuad]) {
    float squares[kQuad] = {};
    each_key(page, head_dim, [&](int, const float (&k)[kQuad]) {
#pragma unroll
        for (int s = 0; s < kQuad; ++s) squares[s] = fmaf(k[s], k[s], squares[s]);
    });
    add_lines(squares);
#pragma unroll
    for (int s = 0; s < kQuad; ++s) size[s] = __fsqrt_rn(squares[s]);
}

__device__ bool visible(const KeysPage& page, int s) { return page.slots >> (lane() % 4 * kQuad + s) & 1; }

// x [16 slots] of the page's visible slots to `out`, 0 of the others.
__device__ void put(const KeysPage& page, const float (&x)[kQuad], float* out) {
    if (lane() >= kSlots / kQuad) return;
#pragma unroll
    for (int s = 0; s < kQuad; ++s) out[lane() * kQuad + s] = visible(page, s) ? x[s] : 0.0f;
}

// The page of an entry; without slots if none is visible.
__device__ KeysPage page_of(const KeysArgs& args, const ops::KeysRow& row, int entry) {
    KeysPage page{};
    const PageId id = row.pages[entry];
    page.slots = id < 0 ? 0 : row.visible ? row.visible[entry] : kAllSlots;
    if (!page.slots) return page;
    page.data = page_at(args.pools, id), page.format = format_at(args.pools, id);
    if (is_full(page.format)) return page;
    page.group = group_size(page.format, args.head_dim);
    if (row.centre) page.centre = args.centres + args.row() * args.stride;
    return page;
}

// work(entry, page) for the warp's entries of a block's chunk.
template <class Work>
__device__ __forceinline__ void each_page(const KeysArgs& args, Work work) {
    const ops::KeysRow& row = args.batch.rows[blockIdx.y];
    const int first = static_cast<int>(blockIdx.x) * kUnitEntries;
    for (int entry = first + warp(); entry < min(row.entries, first + kUnitEntries); entry += kWarps) {
        work(entry, page_of(args, row, entry));
    }
}

// --- Kernels ---------------------------------------------------------------------------------------------------------

template <int N>
__global__ void __launch_bounds__(kWarp)
    turn_centres(const __grid_constant__ KeysArgs args, const __grid_constant__ Rotation rotation) {
    const float* const centre = args.batch.rows[blockIdx.y].centre;
    if (!centre) return;
    float x[N];
#pragma unroll
    for (int s = 0; s < N; ++s) x[s] = s * kWarp + lane() < args.head_dim ? centre[s * kWarp + lane()] : 0.0f;
    rotate(x, rotation, false);
#pragma unroll
    for (int s = 0; s < N; ++s) {
        if (s * kWarp + lane() < args.head_dim) args.centres[args.row() * args.stride + s * kWarp + lane()] = x[s];
    }
}

__global__ void __launch_bounds__(kThreads) score_norms(const __grid_constant__ KeysArgs args) {
    float* const score = args.batch.rows[blockIdx.y].score;
    each_page(args, [&](int entry, const KeysPage& page) {
        float x[kQuad] = {};
        if (page.slots) find_sizes(page, args.head_dim, x);
#pragma unroll
        for (int s = 0; s < kQuad; ++s) x[s] = -x[s];
        put(page, x, score + static_cast<int64_t>(entry) * kSlots);
    });
}

// Sums of the chunk's directions k / |k| in each domain; sizes are left in place of the scores.
__global__ void __launch_bounds__(kThreads) add_directions(const __grid_constant__ KeysArgs args) {
    const ops::KeysRow& row = args.batch.rows[blockIdx.y];
    const int chunk = static_cast<int>(blockIdx.x), all = kDomains * args.stride;
    if (chunk >= chunks_of(row.entries)) return;
    float* const sums = reinterpret_cast<float*>(dynamic_shared()) + warp() * all;  // of the warp
    for (int i = lane(); i < all; i += kWarp) sums[i] = 0.0f;
    __syncwarp();
    each_page(args, [&](int entry, const KeysPage& page) {
        float size[kQuad] = {}, weight[kQuad];
        if (page.slots) find_sizes(page, args.head_dim, size);
        put(page, size, row.score + static_cast<int64_t>(entry) * kSlots);
        if (!page.slots) return;
#pragma unroll
        for (int s = 0; s < kQuad; ++s) {
            weight[s] = visible(page, s) && size[s] != 0.0f ? __fdiv_rn(1.0f, size[s]) : 0.0f;
        }
        float* const to = sums + (is_full(page.format) ? kPlain : kRotated) * args.stride;
        each_key(page, args.head_dim, [&](int d, const float (&k)[kQuad]) {
            float sum = 0.0f;
#pragma unroll
            for (int s = 0; s < kQuad; ++s) sum = fmaf(visible(page, s) ? k[s] : 0.0f, weight[s], sum);
            const unsigned of_line = 0xFu << (lane() & ~3);  // other lines may have ended
            sum += __shfl_xor_sync(of_line, sum, 1);
            sum += __shfl_xor_sync(of_line, sum, 2);
            if (lane() % 4 == 0) to[d] += sum;
        });
        __syncwarp();  // the next page's dims may belong to other lanes
    });
    __syncthreads();
    float* const part = args.part(args.row(), chunk);
    const float* const first = reinterpret_cast<const float*>(dynamic_shared());
    for (int i = static_cast<int>(threadIdx.x); i < all; i += kThreads) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w) sum += first[w * all + i];
        part[i] = sum;
    }
}

// The row's anchor as a vector of length 1 in both domains; 0 if it has none. A block per row; warp w adds up chunks w, w + 8, ...,
// so that bits do not depend on how many follow.
template <int N>
__global__ void __launch_bounds__(kThreads)
    find_anchors(const __grid_constant__ KeysArgs args, const __grid_constant__ Rotation rotation, bool turns) {
    __shared__ float sums[kWarps][kDomains * kMaxHeadDim];
    const int chunks = chunks_of(args.batch.rows[blockIdx.y].entries), all = kDomains * args.stride;
    const int64_t r = args.row();
    for (int i = lane(); i < all; i += kWarp) {
        float sum = 0.0f;
        for (int chunk = warp(); chunk < chunks; chunk += kWarps) sum += args.part(r, chunk)[i];
        sums[warp()][i] = sum;
    }
    __syncthreads();
    if (warp() != 0) return;
    float anchor[N], turned[N];
    double square = 0.0;
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const int d = s * kWarp + lane();
        anchor[s] = turned[s] = 0.0f;
        for (int w = 0; d < args.head_dim && w < kWarps; ++w) {
            anchor[s] += sums[w][d], turned[s] += sums[w][args.stride + d];
        }
    }
    if (turns) {  // both parts in the plain domain, then the whole in both
        rotate(turned, rotation, true);
#pragma unroll
        for (int s = 0; s < N; ++s) turned[s] = anchor[s] += turned[s];
        rotate(turned, rotation, false);
    }
#pragma unroll
    for (int s = 0; s < N; ++s) square += static_cast<double>(anchor[s]) * anchor[s];
    for (int step = kWarp / 2; step > 0; step /= 2) square += __shfl_xor_sync(kAllLanes, square, step);
    const float length = square != 0.0 ? static_cast<float>(sqrt(square)) : 1.0f;
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const int d = s * kWarp + lane();
        if (d >= args.head_dim) continue;
        args.anchor(r)[d] = __fdiv_rn(anchor[s], length);
        args.anchor(r)[args.stride + d] = __fdiv_rn(turned[s], length);
    }
}

// From the sizes that add_directions left.
__global__ void __launch_bounds__(kThreads) score_angles(const __grid_constant__ KeysArgs args) {
    float* const score = args.batch.rows[blockIdx.y].score;
    const float* const anchors = args.anchor(args.row());
    each_page(args, [&](int entry, const KeysPage& page) {
        if (!page.slots) return;
        const float* const anchor = anchors + (is_full(page.format) ? kPlain : kRotated) * args.stride;
        float dots[kQuad] = {};
        each_key(page, args.head_dim, [&](int d, const float (&k)[kQuad]) {
#pragma unroll
            for (int s = 0; s < kQuad; ++s) dots[s] = fmaf(k[s], anchor[d], dots[s]);
        });
        add_lines(dots);
        float* const out = score + static_cast<int64_t>(entry) * kSlots;
#pragma unroll
        for (int s = 0; s < kQuad; ++s) {
            const float size = out[lane() % 4 * kQuad + s];
            dots[s] = size == 0.0f ? 0.0f : __fdiv_rn(-dots[s], size);
        }
        __syncwarp();
        put(page, dots, out);
    });
}

// --- A call ----------------------------------------------------------------------------------------------------------

void lay_out(const ops::ScoreKeysParams& p, Places& places, KeysArgs& args) {
    for (int r = 0; r < p.n_rows; ++r) {
        const int chunks = chunks_of(p.rows[r].entries);
        args.chunks = args.chunks < chunks ? chunks : args.chunks;
    }
    args.head_dim = p.head_dim, args.stride = padded_dim(p.head_dim);
    const int64_t vectors = p.n_rows, domains = p.kind == ops::KeyScore::norm ? 0 : kDomains;
    args.centres = places.take<float>(vectors * args.stride);
    args.parts = places.take<float>(vectors * args.chunks * domains * args.stride);
    args.anchors = places.take<float>(vectors * domains * args.stride);
}

int score(const ops::ScoreKeysParams& p, cudaStream_t stream) {
    Places places(p.workspace);
    KeysArgs args{};
    lay_out(p, places, args);
    if (!args.chunks) return 0;
    args.pools = pools_of(p.pools);
    const bool turns = quantizable(p.head_dim);
    const Rotation turn = rotation(p.head_dim);
    return in_batches(p.rows, p.n_rows, [&](const RowBatch<ops::KeysRow>& rows) {
        args.batch = rows;
        const auto count = static_cast<unsigned>(rows.count);
        const dim3 grid(static_cast<unsigned>(args.chunks), count);
        const auto run = [&](void (*kernel)(KeysArgs), size_t shared) {
            return launch("score_keys", kernel, grid, kThreads, shared, stream, args);
        };
        if (turns) {
            const int code = with_registers(p.head_dim, [&]<int N>() {
                return launch("score_keys", turn_centres<N>, dim3(1, count), kWarp, 0, stream, args, turn);
            });
            if (code) return code;
        }
        if (p.kind == ops::KeyScore::norm) return run(score_norms, 0);
        const size_t shared = sizeof(float) * kWarps * kDomains * static_cast<size_t>(args.stride);
        if (const int code = run(add_directions, shared)) return code;
        const int code = with_registers(p.head_dim, [&]<int N>() {
            return launch("score_keys", find_anchors<N>, dim3(1, count), kThreads, 0, stream, args, turn, turns);
        });
        return code ? code : run(score_angles, 0);
    });
}

}  // namespace
}  // namespace kvstrata::cuda

int64_t kvstrata_cuda_score_keys_workspace_bytes(const kvstrata::ops::ScoreKeysParams* params) {
    kvstrata::Places none(nullptr);
    kvstrata::cuda::KeysArgs unused{};
    kvstrata::cuda::lay_out(*params, none, unused);
    return none.bytes();
}

int kvstrata_cuda_score_keys(const kvstrata::ops::ScoreKeysParams* params, void* stream) {
    return kvstrata::cuda::score(*params, static_cast<cudaStream_t>(stream));
}
