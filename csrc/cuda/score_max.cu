// score_max on CUDA: a warp takes a pair of pages through the queries of one span after the other, head by head, and keeps the
// largest. The formula is in ops/score_max.h, the walk in window.cuh.
//
// Queries become operands in waves of bounded memory; between waves `out` holds the largest z - lse. Keys are read from memory
// once per wave (again from L1 or L2 for every group of tiles). Bound by the products: no exp but one per slot and span.
#include "cuda/api.h"
#include "cuda/window_logits.cuh"

namespace kvstrata::cuda {
namespace {

#if defined(KVSTRATA_EMULATE)
constexpr int64_t kWaveBytes = 1 << 16;  // small, so that tests see several waves
#else
constexpr int64_t kWaveBytes = 64 << 20;  // of operands
#endif

struct MaxArgs {
    WindowRows batch;  // queries of the wave
    Pools pools;
    Operands operands;
    const int32_t* spans;  // [E + 1]
    int32_t n_spans, group, head_dim, chunks;
    int32_t begin, end;  // queries of the wave
    bool first, last;    // wave
    float scale, softcap;
    const float* lse;  // [R, G, W]
    int64_t lse_stride_r, lse_stride_g;
    float* out;  // [E, R, M, 16]
    int64_t out_stride_e, out_stride_r;
};

// The part of a span that lies in the wave, counted from the wave's first query.
struct Stretch {
    int begin, end;
};

// Tiles of a stretch in every head, one after the other: `i` of them.
__device__ TileGroup tiles_of_stretch(Stretch stretch, int64_t row, int of_head, int i, int n) {
    const int first = stretch.begin / kColumns, each = tiles_of(stretch.end) - first;
    TileGroup tiles{row, {}, min(kGroupTiles, n - i)};
#pragma unroll
    for (int j = 0; j < kGroupTiles; ++j) {
        const int at = min(i + j, n - 1);
        tiles.tile[j] = at / each * of_head + first + at % each;
    }
    return tiles;
}

using Tops = float[kPair][2];

// Raises `tops` by the queries of a group of tiles that are in the stretch and saw something.
__device__ void raise(const MaxArgs& args, const float* lse, Stretch stretch, const TileGroup& tiles, int of_head,
                      const Logits& z, Tops& tops) {
#pragma unroll
    for (int j = 0; j < kGroupTiles; ++j) {
        if (j >= tiles.count) break;
        const int g = tiles.tile[j] / of_head;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int t = tiles.tile[j] % of_head * kColumns + 2 * query_lane() + c;
            if (t < stretch.begin || t >= stretch.end) continue;
            const float own = lse[g * args.lse_stride_g + args.begin + t];
            if (own == -INFINITY) continue;
#pragma unroll
            for (int i = 0; i < 2 * kPair; ++i) {
                tops[i / 2][i % 2] = larger(z[i / 2][j][2 * (i % 2) + c] - own, tops[i / 2][i % 2]);
            }
        }
    }
}

// The pair's scores of one span; between waves, z - lse.
__device__ void put_tops(const MaxArgs& args, const PagePair& pages, const Tops& tops, float* out) {
#pragma unroll
    for (int i = 0; i < 2 * kPair; ++i) {
        const int p = i / 2, slot = 2 * slot_lane() + i % 2;
        float top = warp_max<4>(tops[p][i % 2]);
        if (query_lane() != 0 || pages.entry[p] < 0) continue;
        float* const at = out + pages.entry[p] * kSlots + slot;
        if (!args.first) top = larger(*at, top);
        const bool visible = pages.slots[p] >> slot & 1;
        *at = args.last ? (visible ? exp_(top) : 0.0f) : top;
    }
}

// A block: one chunk of a row's entries under all queries of the wave.
__global__ void __launch_bounds__(kUnitThreads, kUnitsPerSm) find_tops(const __grid_constant__ MaxArgs args) {
    __shared__ UnitPages pages;
    const ops::WindowRow& row = args.batch.rows[blockIdx.y];
    const int chunk = static_cast<int>(blockIdx.x), entry = chunk * kUnitEntries, of_head = tiles_of(row.queries);
    if (entry >= row.entries) return;
    const int64_t r = args.batch.first + static_cast<int64_t>(blockIdx.y);
    if (warp() == 0) find_pages(pages, args.pools, row, args.head_dim, chunk, {}, 0);
    __syncthreads();
    float* const out = args.out + r * args.out_stride_r + entry * kSlots;
    if (args.last) {
        clear_others(pages, min(kUnitEntries, row.entries - entry), 0, args.n_spans, args.out_stride_e, out);
    }
    for (int i = warp(); i < pages.count; i += kUnitWarps) {
        fetch_ahead(pages, i + kUnitWarps, args.head_dim);
        const PagePair& pair = pages.pairs[i];
        for (int e = 0; e < args.n_spans; ++e) {
            const Stretch stretch{max(args.spans[e], args.begin) - args.begin,
                                  min(args.spans[e + 1], args.end) - args.begin};
            Tops tops = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
            const int n =
                stretch.begin < stretch.end ? args.group * (tiles_of(stretch.end) - stretch.begin / kColumns) : 0;
            for (int at = 0; at < n; at += kGroupTiles) {
                const TileGroup tiles = tiles_of_stretch(stretch, r * args.operands.tiles, of_head, at, n);
                Logits z;
                find_logits(pair, args.operands, tiles, args.head_dim, args.scale, args.softcap, z);
                raise(args, args.lse + r * args.lse_stride_r, stretch, tiles, of_head, z, tops);
            }
            put_tops(args, pair, tops, out + e * args.out_stride_e);
        }
    }
}

// Queries of a wave, whole tiles.
int wave_of(const ops::ScoreMaxParams& p) {
    Places tile(nullptr);
    lay_out_operands(p, p.group, tile);  // one of each head
    const int64_t tiles = kWaveBytes / (tile.bytes() ? tile.bytes() : 1);
    const int64_t all = tiles_of(p.queries);
    return static_cast<int>(kColumns * (tiles < 1 ? 1 : tiles < all ? tiles : all));
}

// The row's queries of a wave; all are earlier than any slot.
ops::WindowRow row_of_wave(const ops::WindowRow& row, const ops::ScoreMaxParams& p, int begin, int count) {
    ops::WindowRow part = row;
    part.q = static_cast<const char*>(row.q) + begin * row.q_stride_t * dtype_bytes(p.q_dtype);
    part.tokens = row.tokens ? row.tokens + begin : nullptr;
    part.q_pos = nullptr;
    part.queries = count;
    return part;
}

int score(const ops::ScoreMaxParams& p, cudaStream_t stream) {
    Places places(p.workspace);
    const int wave = wave_of(p);
    MaxArgs args{{},
                 pools_of(p.pools),
                 lay_out_operands(p, p.group * tiles_of(wave), places),
                 p.spans,
                 p.n_spans,
                 p.group,
                 p.head_dim,
                 0,
                 0,
                 0,
                 true,
                 false,
                 p.scale,
                 p.softcap,
                 p.lse,
                 p.lse_stride_r,
                 p.lse_stride_g,
                 p.out,
                 p.out_stride_e,
                 p.out_stride_r};
    return in_batches(p.rows, p.n_rows, [&](const WindowRows& rows) {
        args.chunks = 0;
        for (int i = 0; i < rows.count; ++i) {
            const int chunks = chunks_of(rows.rows[i].entries);
            args.chunks = args.chunks < chunks ? chunks : args.chunks;
        }
        args.begin = args.end = 0;
        do {
            args.begin = args.end;
            args.end = p.queries - args.begin < wave ? p.queries : args.begin + wave;
            args.first = args.begin == 0, args.last = args.end == p.queries;
            args.batch = rows;
            for (int i = 0; i < rows.count; ++i) {
                args.batch.rows[i] = row_of_wave(rows.rows[i], p, args.begin, args.end - args.begin);
            }
            if (const int code = fill_operands("score_max", args.batch, p, args.operands, stream)) return code;
            const dim3 grid(static_cast<unsigned>(args.chunks), static_cast<unsigned>(rows.count));
            if (!args.chunks) return 0;
            if (const int code = launch("score_max", find_tops, grid, kUnitThreads, 0, stream, args)) return code;
        } while (!args.last);
        return 0;
    });
}

}  // namespace
}  // namespace kvstrata::cuda

// Grows with each of its inputs, pools too, which a wave's memory does not.
int64_t kvstrata_cuda_score_max_workspace_bytes(const kvstrata::ops::ScoreMaxParams* params) {
    using namespace kvstrata::cuda;
    kvstrata::Places one(nullptr), all(nullptr);
    lay_out_operands(*params, params->group, one);
    lay_out_operands(*params, params->group * tiles_of(params->queries), all);
    const int64_t wave = all.bytes() < kWaveBytes ? all.bytes() : kWaveBytes;
    return one.bytes() < wave ? wave : one.bytes();
}

int kvstrata_cuda_score_max(const kvstrata::ops::ScoreMaxParams* params, void* stream) {
    return kvstrata::cuda::score(*params, static_cast<cudaStream_t>(stream));
}
