// The C interface of libkvstrata_cuda.so.
//
// Every function returns 0, a cudaError_t (> 0), or kInvalid (-1) for an argument that this library refuses;
// kvstrata_cuda_last_error() then says which call failed, where, and why, for the calling thread. No function allocates
// device memory, and none but device_count and the versions waits for the device. `stream` is the raw cudaStream_t of
// the caller; pointers inside params name device memory unless said otherwise.
#pragma once

#include <cstdint>

#include "ops/accumulate.h"
#include "ops/merge.h"

#define KVSTRATA_CUDA_API extern "C" __attribute__((visibility("default")))

namespace kvstrata::cuda {

// Raised whenever a signature or a params struct changes; the caller compares it before the first call.
inline constexpr int kAbiVersion = 1;
inline constexpr int kInvalid = -1;

// merge: at most this many partials in one call (their pointers travel as kernel arguments).
inline constexpr int kMaxMergeParts = 128;

}  // namespace kvstrata::cuda

KVSTRATA_CUDA_API int kvstrata_cuda_abi_version();
KVSTRATA_CUDA_API int kvstrata_cuda_device_count(int* count);
KVSTRATA_CUDA_API int kvstrata_cuda_driver_version(int* version);   // 13000 is 13.0; 0: no driver
KVSTRATA_CUDA_API int kvstrata_cuda_runtime_version(int* version);  // the runtime inside this library

// The runtime's text for an error code; never null.
KVSTRATA_CUDA_API const char* kvstrata_cuda_error_string(int code);
// "call at file:line: text (code)" of this thread's last failure, or "". Valid until the thread's next failure.
KVSTRATA_CUDA_API const char* kvstrata_cuda_last_error();

// ops/merge.h. params->outs and params->lses are host arrays of device pointers; params->threads is not read.
KVSTRATA_CUDA_API int kvstrata_cuda_merge(const kvstrata::ops::MergeParams* params, void* stream);

// ops/accumulate.h.
KVSTRATA_CUDA_API int kvstrata_cuda_accumulate(const kvstrata::ops::AccumulateParams* params, void* stream);
