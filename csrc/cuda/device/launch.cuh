// A kernel launch, and dynamic shared memory: on the device, or emulated (KVSTRATA_EMULATE).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/error.h"
#if defined(KVSTRATA_EMULATE)
#include "cuda/emulate/emulate.h"
#endif

namespace kvstrata::cuda {

inline constexpr size_t kSharedWithoutAsking = 48 * 1024;  // bytes; more needs an attribute of the kernel

// launch("merge", merge_rows<T>, grid, block, shared_bytes, stream, args...): 0, or the code that failed() kept. `grid` has no
// zero; `shared_bytes` of dynamic shared memory; `args` convert to the kernel's parameters.
template <class... P, class... A>
int launch(const char* op, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
           A&&... args) {
#if defined(KVSTRATA_EMULATE)
    static_cast<void>(stream);
    const cudaError_t code = emulate::launch(op, kernel, grid, block, shared_bytes, static_cast<A&&>(args)...);
#else
    if (shared_bytes > kSharedWithoutAsking) {
        KV_CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    const cudaError_t code = cudaLaunchKernelEx(&config, kernel, static_cast<A&&>(args)...);
#endif
    return code == cudaSuccess ? 0 : failed(code, op, __FILE__, __LINE__);
}

// Blocks of `each` that cover n, as a grid's x.
inline unsigned blocks_for(int64_t n, int each) { return static_cast<unsigned>((n + each - 1) / each); }

// The block's dynamic shared memory, 128-byte aligned.
__device__ inline unsigned char* dynamic_shared() {
#if defined(KVSTRATA_EMULATE)
    return emulate::dynamic_shared();
#else
    extern __shared__ __align__(128) unsigned char kv_dynamic_shared[];
    return kv_dynamic_shared;
#endif
}

}  // namespace kvstrata::cuda
