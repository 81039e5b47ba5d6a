// mass on CUDA: one thread per slot of a row, which walks the queries in order. The formula is in ops/mass.h. Reads 4 bytes per
// logit, writes 4 per slot: bound by memory; neighbours read neighbours.
#include <algorithm>

#include "cuda/api.h"
#include "cuda/device/math.cuh"
#include "cuda/device/warp.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kThreads = 256;

// exp(z - lse), and 0 where either is -inf.
__device__ float share(float z, float lse) { return z == -INFINITY || lse == -INFINITY ? 0.0f : exp_(z - lse); }

template <ops::Reduce R>
__global__ void __launch_bounds__(kThreads)
    reduce_shares(const float* logits, const float* lse, float* mass, int queries, int64_t slots) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = blockIdx.y;
    if (i >= slots) return;
    const float* const z = logits + row * queries * slots + i;
    float sum = 0.0f;
#pragma unroll 4
    for (int q = 0; q < queries; ++q) {
        const float x = share(z[q * slots], lse[row * queries + q]);
        sum = R == ops::Reduce::max ? larger(x, sum) : sum + x;
    }
    mass[row * slots + i] = R == ops::Reduce::mean && queries > 0 ? sum / static_cast<float>(queries) : sum;
}

constexpr int kMostRows = 65535;  // of a launch

template <ops::Reduce R>
int reduce(const ops::MassParams& p, cudaStream_t stream) {
    const int64_t slots = static_cast<int64_t>(p.entries) * kSlots, queries = static_cast<int64_t>(p.group) * p.queries;
    for (int64_t first = 0; first < p.rows; first += kMostRows) {
        const dim3 grid(blocks_for(slots, kThreads),
                        static_cast<unsigned>(std::min<int64_t>(p.rows - first, kMostRows)));
        const int code = launch("mass", reduce_shares<R>, grid, kThreads, 0, stream, p.logits + first * queries * slots,
                                p.lse + first * queries, p.mass + first * slots, static_cast<int>(queries), slots);
        if (code) return code;
    }
    return 0;
}

}  // namespace
}  // namespace kvstrata::cuda

int kvstrata_cuda_mass(const kvstrata::ops::MassParams* params, void* stream) {
    using namespace kvstrata;
    const ops::MassParams& p = *params;
    if (!p.rows || !p.entries) return 0;
    const auto on = static_cast<cudaStream_t>(stream);
    switch (p.reduce) {
        case ops::Reduce::sum: return cuda::reduce<ops::Reduce::sum>(p, on);
        case ops::Reduce::mean: return cuda::reduce<ops::Reduce::mean>(p, on);
        default: return cuda::reduce<ops::Reduce::max>(p, on);
    }
}
