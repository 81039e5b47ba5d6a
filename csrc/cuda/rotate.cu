// rotate on CUDA: one warp per vector, in registers. The formula is in ops/rotate.h.
//
// Bound by memory: 8 D bytes per vector, in and out, in lines of 128 bytes; at D = 128, 20 shuffles and 40 additions per
// lane beside 4 loads and 4 stores.
#include "cuda/api.h"
#include "cuda/device/rotate.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kWarps = 8;  // vectors of a block

template <int N>
__global__ void __launch_bounds__(kWarps* kWarp)
    rotate_vectors(const float* x, float* out, int64_t n, const __grid_constant__ Rotation rotation, bool inverse) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
    if (i >= n) return;
    float held[N];
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const int d = s * kWarp + lane();
        held[s] = d < rotation.dim ? x[i * rotation.dim + d] : 0.0f;
    }
    rotate(held, rotation, inverse);
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const int d = s * kWarp + lane();
        if (d < rotation.dim) out[i * rotation.dim + d] = held[s];
    }
}

}  // namespace
}  // namespace kvstrata::cuda

int kvstrata_cuda_rotate(const kvstrata::ops::RotateParams* params, void* stream) {
    using namespace kvstrata;
    const ops::RotateParams& p = *params;
    if (!quantizable(p.head_dim)) return cuda::refused("rotate", "head_dim is not a multiple of 16 in 32..512");
    if (p.n < 0 || p.n > int64_t{0x7fffffff}) return cuda::refused("rotate", "n is not in 0..2^31-1");
    if (p.n == 0) return 0;
    return cuda::with_registers(p.head_dim, [&]<int N>() {
        return cuda::launch("rotate", cuda::rotate_vectors<N>, cuda::blocks_for(p.n, cuda::kWarps),
                            cuda::kWarps * cuda::kWarp, 0, static_cast<cudaStream_t>(stream), p.x, p.out, p.n,
                            cuda::rotation(p.head_dim), p.inverse);
    });
}
