// The C interface of libkvstrata_cuda.so.
//
// Every function returns 0, a cudaError_t (> 0), or kInvalid (-1) for an argument that this library refuses;
// kvstrata_cuda_last_error() then says which call failed, where, and why, for the calling thread. No function allocates
// device memory, and none but device_count and the versions waits for the device. `stream` is the raw cudaStream_t of
// the caller; pointers inside params name device memory unless said otherwise.
#pragma once

#include <cstdint>

#include "ops/list.h"
#include "ops/transfer.h"

#define KVSTRATA_CUDA_API extern "C" __attribute__((visibility("default")))

namespace kvstrata::cuda {

// Raised whenever a signature or a params struct changes; the caller compares it before the first call.
inline constexpr int kAbiVersion = 4;
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

// Makes a device the calling thread's; *before: the one that was.
KVSTRATA_CUDA_API int kvstrata_cuda_use_device(int index, int* before);

// ops/transfer.h. pieces and block are host memory. upload reads its source before it returns; download waits for the stream.
KVSTRATA_CUDA_API int kvstrata_cuda_upload(const kvstrata::ops::Piece* pieces, int64_t n, void* stream);
KVSTRATA_CUDA_API int kvstrata_cuda_copy(const kvstrata::ops::Block* block, void* stream);
KVSTRATA_CUDA_API int kvstrata_cuda_download(void* to, const void* from, int64_t bytes, void* stream);

// Every op of csrc/ops, as its header says it. Host memory are params, arrays of structs and of pointers in them, and `pools`;
// all that those point to in turn is device memory, the arrays inside a PoolView too. params->threads is not read.
#define KV_RUN(op, Params) KVSTRATA_CUDA_API int kvstrata_cuda_##op(const kvstrata::ops::Params* params, void* stream);
KV_OPS(KV_RUN)
#undef KV_RUN

// Bytes of device memory, 64-byte aligned, that params->workspace names; known from the numbers in params alone.
#define KV_BYTES(op, Params) \
    KVSTRATA_CUDA_API int64_t kvstrata_cuda_##op##_workspace_bytes(const kvstrata::ops::Params* params);
KV_OPS_IN_WORKSPACE(KV_BYTES)
#undef KV_BYTES
