// Failures of the CUDA runtime, kept with call and place. Private to csrc/cuda.
#pragma once

#include <cuda_runtime.h>

namespace kvstrata::cuda {

// Keeps "call at file:line: text" as this thread's last error and returns the code. A sticky error (the context is
// lost) is also kept for the whole process, so that later failures can name their cause.
int failed(cudaError_t code, const char* call, const char* file, int line);

// Keeps "op: reason" for an argument that we refuse and returns kInvalid.
int refused(const char* op, const char* reason);

}  // namespace kvstrata::cuda

// KV_CUDA_TRY(cudaMemcpyAsync(...)); returns from the enclosing function with the code if the call failed.
#define KV_CUDA_TRY(call)                                                        \
    do {                                                                         \
        if (const cudaError_t kv_code = (call); kv_code != cudaSuccess)          \
            return ::kvstrata::cuda::failed(kv_code, #call, __FILE__, __LINE__); \
    } while (0)
