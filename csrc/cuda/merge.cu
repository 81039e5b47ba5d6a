// merge on CUDA: one warp per (row, head, query) result, partials in ascending order. The formula is in ops/merge.h.
#include "cuda/api.h"
#include "cuda/device/element.cuh"
#include "cuda/device/warp.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kMaxDim = 512;
constexpr int kDimsPerLane = kMaxDim / kWarp;

struct Partials {
    const float* outs[kMaxMergeParts];  // [J] -> f32 [N, D]
    const float* lses[kMaxMergeParts];  // [J] -> f32 [N]
    int count;                          // J
};

// The largest lse, -inf if there is none; a NaN wins, so that it shows in the result.
__device__ float largest_lse(const Partials& parts, int64_t i) {
    float m = -INFINITY;
    for (int j = 0; j < parts.count; ++j) {
        const float lse = parts.lses[j][i];
        m = isnan(lse) || lse > m ? lse : m;
        if (isnan(m)) break;
    }
    return m;
}

// Lane l holds dims l, l + 32, ...; every element is read before it is written, so out may alias outs[0].
template <class T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    merge_rows(const __grid_constant__ Partials parts, int64_t n, int dim, T* out, float* lse_out) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp();
    if (i >= n) return;
    const float m = largest_lse(parts, i);
    float acc[kDimsPerLane] = {};
    float total = 0.0f;
    for (int j = 0; j < parts.count; ++j) {
        const float lse = parts.lses[j][i];
        if (lse == -INFINITY) continue;
        const float w = expf(lse - m);
        const float* row = parts.outs[j] + i * dim;
        total += w;
#pragma unroll
        for (int s = 0; s < kDimsPerLane; ++s)
            if (s * kWarp + lane() < dim) acc[s] = fmaf(w, row[s * kWarp + lane()], acc[s]);
    }
    const bool empty = m == -INFINITY;
#pragma unroll
    for (int s = 0; s < kDimsPerLane; ++s)
        if (s * kWarp + lane() < dim) store(out + i * dim + s * kWarp + lane(), empty ? 0.0f : acc[s] / total);
    __syncwarp();  // lse_out may alias lses[0]: all lanes have read it
    if (lane() == 0 && lse_out != nullptr) lse_out[i] = empty ? m : m + logf(total);
}

Partials partials_of(const ops::MergeParams& p) {
    Partials parts{};
    parts.count = p.parts;
    for (int j = 0; j < p.parts; ++j) {
        parts.outs[j] = p.outs[j];
        parts.lses[j] = p.lses[j];
    }
    return parts;
}

}  // namespace
}  // namespace kvstrata::cuda

int kvstrata_cuda_merge(const kvstrata::ops::MergeParams* params, void* stream) {
    using namespace kvstrata;
    const ops::MergeParams& p = *params;
    if (p.parts < 1 || p.parts > cuda::kMaxMergeParts) return cuda::refused("merge", "parts is not in 1..128");
    if (p.head_dim < 1 || p.head_dim > cuda::kMaxDim) return cuda::refused("merge", "head_dim is not in 1..512");
    if (p.n < 0 || p.n > int64_t{0x7fffffff}) return cuda::refused("merge", "n is not in 0..2^31-1");
    if (p.n == 0) return 0;
    const auto launch_as = [&]<class T>() {
        return cuda::launch("merge", cuda::merge_rows<T>, cuda::blocks_for(p.n, cuda::kWarpsPerBlock),
                            cuda::kWarp * cuda::kWarpsPerBlock, 0, static_cast<cudaStream_t>(stream),
                            cuda::partials_of(p), p.n, p.head_dim, static_cast<T*>(p.out), p.lse);
    };
    if (p.out_dtype > DType::f16) return cuda::refused("merge", "out_dtype is not f32, bf16 or f16");
    return cuda::with_float_type(p.out_dtype, launch_as, cuda::kInvalid);
}
