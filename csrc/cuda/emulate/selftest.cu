// Kernels by which tests/cuda/test_emulation.py knows that the emulation is true. Only in the emulated library.
#include "cuda/api.h"
#include "cuda/device/copy.cuh"
#include "cuda/device/element.cuh"
#include "cuda/device/math.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/page.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/device/warp.cuh"

namespace kvstrata::cuda {
namespace {

// in i32 [threads] -> out i64 [threads, 12]: what each lane gets from shuffles, votes and reductions of its value.
__global__ void lanes(const int* in, int64_t* out) {
    const int i = static_cast<int>(threadIdx.x), x = in[i];
    const bool odd = x % 2 != 0;
    int64_t* own = out + i * 12;
    own[0] = __shfl_sync(kAllLanes, x, 5);
    own[1] = __shfl_sync(kAllLanes, x, lane() + 1, 8);
    own[2] = __shfl_xor_sync(kAllLanes, int64_t{x} << 32, 3) >> 32;
    own[3] = __shfl_down_sync(kAllLanes, x, 2u, 16);
    own[4] = __shfl_up_sync(kAllLanes, x, 2u);
    own[5] = __ballot_sync(kAllLanes, odd);
    own[6] = __any_sync(kAllLanes, x == 7);
    own[7] = __all_sync(kAllLanes, x >= 0);
    own[8] = __match_any_sync(kAllLanes, x % 3);
    own[9] = __reduce_add_sync(kAllLanes, x);
    own[10] = __reduce_max_sync(kAllLanes, x);
    const unsigned half = lane() < 16 ? 0xFFFFu : 0xFFFF0000u;  // two halves, each at its own pace
    own[11] = lane() < 16 ? __reduce_add_sync(half, x) : 0;
    if (lane() >= 16) own[11] = __shfl_sync(half, x, 31);
}

// in f32 [blocks, 96] -> out f32 [blocks, 96, 5]: the value of the thread across the block, sum, maximum, count of positive,
// the last thread's value.
__global__ void __launch_bounds__(96) block_values(const float* in, float* out) {
    __shared__ float values[96];
    __shared__ float last;
    const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
    const int64_t at = static_cast<int64_t>(blockIdx.x) * n + i;
    values[i] = in[at];
    if (i == n - 1) last = in[at];
    __syncthreads();
    out[at * 5] = values[n - 1 - i];
    out[at * 5 + 1] = block_sum(in[at]);
    out[at * 5 + 2] = block_max(in[at]);
    out[at * 5 + 3] = static_cast<float>(__syncthreads_count(in[at] > 0.0f));
    out[at * 5 + 4] = last;
}

// out u32 [2]: the first words of static and dynamic shared memory that nobody has written; then writes at `offset`.
__global__ void unwritten(uint32_t* out, int offset) {
    __shared__ uint32_t word[4];
    out[0] = word[1];
    out[1] = reinterpret_cast<const uint32_t*>(dynamic_shared())[3];
    dynamic_shared()[offset] = 1;
}

enum class Fault : int { divergent, returned, outside, two_places, half_mma, no_barrier };

// What the emulation must refuse, or for no_barrier: out depends on the order of threads.
__global__ void faulty(Fault fault, int* out) {
    __shared__ int values[64];
    const int i = static_cast<int>(threadIdx.x);
    int32_t d[4] = {};
    switch (fault) {
        case Fault::divergent:
            if (i < 40) __syncthreads();
            if (i >= 40) __syncwarp();
            break;
        case Fault::returned:
            if (i == 3) return;
            out[i] = __shfl_xor_sync(kAllLanes, i, 1);
            break;
        case Fault::outside: out[i] = __shfl_sync(0xFFFFu, i, 0); break;
        case Fault::two_places:
            if (i < 32) {
                __syncthreads();
            } else {
                __syncthreads();
            }
            break;
        case Fault::half_mma:
            if (lane() < 16) mma_s8(d, {1, 1, 1, 1}, {1, 1});
            break;
        case Fault::no_barrier:
            values[i] = i;
            out[i] = values[(i + 1) % 64];
            break;
    }
}

// a [16, K], b [8, K] (K bytes of a row as they lie), d [16, 8] +=. One warp; the fragments are gathered by the element
// numbers of device/mma.cuh.
template <class Number, int Bytes, int RegistersA, class Multiply>
__device__ void tile(const unsigned char* a, const unsigned char* b, Number* d, Multiply multiply) {
    const int g = lane() / 4, t = lane() % 4;
    uint32_t of_a[RegistersA], of_b[RegistersA / 2];
    for (int r = 0; r < RegistersA; ++r)
        of_a[r] = reinterpret_cast<const uint32_t*>(a + (g + r % 2 * 8) * Bytes)[t + r / 2 * 4];
    for (int r = 0; r < RegistersA / 2; ++r) of_b[r] = reinterpret_cast<const uint32_t*>(b + g * Bytes)[t + r * 4];
    Number of_d[4];
    for (int r = 0; r < 4; ++r) of_d[r] = d[(g + r / 2 * 8) * 8 + t * 2 + r % 2];
    multiply(of_d, of_a, of_b);
    for (int r = 0; r < 4; ++r) d[(g + r / 2 * 8) * 8 + t * 2 + r % 2] = of_d[r];
}

// kind: 0 bf16, 1 f16, 2 s8, 3 u8s8, 4 s8_k16, 5 u8s8_k16.
__global__ void products(int kind, const unsigned char* a, const unsigned char* b, void* d) {
    auto* const f = static_cast<float*>(d);
    auto* const i = static_cast<int32_t*>(d);
    if (kind == 0) tile<float, 32, 4>(a, b, f, [](auto& x, auto& y, auto& z) { mma_bf16(x, y, z); });
    if (kind == 1) tile<float, 32, 4>(a, b, f, [](auto& x, auto& y, auto& z) { mma_f16(x, y, z); });
    if (kind == 2) tile<int32_t, 32, 4>(a, b, i, [](auto& x, auto& y, auto& z) { mma_s8(x, y, z); });
    if (kind == 3) tile<int32_t, 32, 4>(a, b, i, [](auto& x, auto& y, auto& z) { mma_u8s8(x, y, z); });
    if (kind == 4) tile<int32_t, 16, 2>(a, b, i, [](auto& x, auto& y, auto& z) { mma_s8_k16(x, y, z); });
    if (kind == 5) tile<int32_t, 16, 2>(a, b, i, [](auto& x, auto& y, auto& z) { mma_u8s8_k16(x, y, z); });
}

// in u32 [2, 32, 4] in two groups -> out u32 [3, 32, 4]: what lies there before the wait, after a wait for the first group, and
// after one for both (of the second group the first 4 words).
__global__ void copies(const uint32_t* in, uint32_t* out) {
    auto* const to = reinterpret_cast<uint32_t*>(dynamic_shared());
    const int at = lane() * 4;
    const auto show = [&](int moment, int group) {
        for (int j = 0; j < 4; ++j) out[moment * 128 + at + j] = to[group * 128 + at + j];
    };
    for (int j = 0; j < 8; ++j) to[j / 4 * 128 + at + j % 4] = 0;
    for (int group = 0; group < 2; ++group) {
        copy_async16(to + group * 128 + at, in + group * 128 + at);
        copy_async_commit();
    }
    show(0, 0);
    copy_async_wait<1>();
    show(1, 0);
    copy_async_wait<0>();
    show(2, 1);
}

struct Row {
    int32_t value, padding[31];
};
__global__ void numbered(const __grid_constant__ RowBatch<Row> batch, int32_t* out) {
    if (threadIdx.x == 0) out[batch.first + static_cast<int>(blockIdx.x)] = batch.rows[blockIdx.x].value;
}

// out f32 [2, 16, dim]: K and V of the page with id `id`, element by element.
template <Format F>
__global__ void read_page(const __grid_constant__ Pools pools, PageId id, int dim, float* out) {
    const int d = static_cast<int>(threadIdx.x), slot = static_cast<int>(blockIdx.x);
    const unsigned char* page = page_at(pools, id);
    if (d >= dim) return;
    out[slot * dim + d] = key<F>(page, dim, slot, d);
    out[(kSlots + slot) * dim + d] = value<F>(page, dim, slot, d);
}

__global__ void functions(const float* in, float* out, int n) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
        out[i] = exp_(in[i]);
        out[n + i] = tanh_(in[i]);
    }
}

}  // namespace
}  // namespace kvstrata::cuda

using namespace kvstrata;

KVSTRATA_CUDA_API int kvstrata_cuda_selftest_lanes(const int* in, int64_t* out, int threads) {
    return cuda::launch("lanes", cuda::lanes, 1, static_cast<unsigned>(threads), 0, nullptr, in, out);
}
KVSTRATA_CUDA_API int kvstrata_cuda_selftest_block(const float* in, float* out, int blocks) {
    return cuda::launch("block_values", cuda::block_values, static_cast<unsigned>(blocks), 96, 0, nullptr, in, out);
}
KVSTRATA_CUDA_API int kvstrata_cuda_selftest_unwritten(uint32_t* out, int shared_bytes, int offset) {
    return cuda::launch("unwritten", cuda::unwritten, 1, 1, static_cast<size_t>(shared_bytes), nullptr, out, offset);
}
KVSTRATA_CUDA_API int kvstrata_cuda_selftest_fault(int fault, int* out) {
    return cuda::launch("faulty", cuda::faulty, 1, 64, 0, nullptr, static_cast<cuda::Fault>(fault), out);
}
KVSTRATA_CUDA_API int kvstrata_cuda_selftest_mma(int kind, const unsigned char* a, const unsigned char* b, void* d) {
    return cuda::launch("products", cuda::products, 1, 32, 0, nullptr, kind, a, b, d);
}
KVSTRATA_CUDA_API int kvstrata_cuda_selftest_copies(const uint32_t* in, uint32_t* out) {
    return cuda::launch("copies", cuda::copies, 1, 32, 1024, nullptr, in, out);
}
KVSTRATA_CUDA_API int kvstrata_cuda_selftest_rows(const cuda::Row* rows, int n, int32_t* out) {
    return cuda::in_batches(rows, n, [&](const cuda::RowBatch<cuda::Row>& batch) {
        return cuda::launch("numbered", cuda::numbered, static_cast<unsigned>(batch.count), 32, 0, nullptr, batch, out);
    });
}
KVSTRATA_CUDA_API int kvstrata_cuda_selftest_page(const PoolView* pools, PageId id, int dim, float* out) {
    const auto read = [&]<Format F>() {
        return cuda::launch("read_page", cuda::read_page<F>, kSlots, 512, 0, nullptr, cuda::pools_of(pools), id, dim,
                            out);
    };
    return cuda::with_format(pools[page_pool(id)].format, read, cuda::kInvalid);
}
KVSTRATA_CUDA_API int kvstrata_cuda_selftest_functions(const float* in, float* out, int n) {
    return cuda::launch("functions", cuda::functions, 1, 128, 0, nullptr, in, out, n);
}
KVSTRATA_CUDA_API int kvstrata_cuda_selftest_launch(int threads, int shared_bytes) {
    return cuda::launch("unwritten", cuda::unwritten, 1, static_cast<unsigned>(threads),
                        static_cast<size_t>(shared_bytes), nullptr, static_cast<uint32_t*>(nullptr), 0);
}
