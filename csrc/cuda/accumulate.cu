// accumulate on CUDA: one thread per four scores. The formula is in ops/accumulate.h; the same operations as on the CPU, so the
// same bits. Moves 12 bytes per score (two reads, one write): bound by memory.
#include "cuda/api.h"
#include "cuda/device/launch.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 4;  // scores of a thread, a block's thread apart: neighbours read neighbours

template <ops::Combine C>
__device__ float combine(float score, float mass, float decay) {
    const float old = decay * score;
    if constexpr (C == ops::Combine::sum) return old + mass;
    return mass > old || isnan(mass) ? mass : old;
}

template <ops::Combine C>
__global__ void __launch_bounds__(kThreads) accumulate_scores(float* score, const float* mass, int64_t n, float decay) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kEach) + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
        const int64_t i = first + j * kThreads;
        if (i < n) score[i] = combine<C>(score[i], mass[i], decay);
    }
}

}  // namespace
}  // namespace kvstrata::cuda

int kvstrata_cuda_accumulate(const kvstrata::ops::AccumulateParams* params, void* stream) {
    using namespace kvstrata;
    const ops::AccumulateParams& p = *params;
    if (p.n < 0 || p.n > int64_t{1} << 40) return cuda::refused("accumulate", "n is not in 0..2^40");
    if (p.n == 0) return 0;
    const auto kernel = p.combine == ops::Combine::sum ? cuda::accumulate_scores<ops::Combine::sum>
                                                       : cuda::accumulate_scores<ops::Combine::max>;
    return cuda::launch("accumulate", kernel, cuda::blocks_for(p.n, cuda::kThreads * cuda::kEach), cuda::kThreads, 0,
                        static_cast<cudaStream_t>(stream), p.score, p.mass, p.n, p.decay);
}
