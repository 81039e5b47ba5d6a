// Versions, devices and errors.
#include "cuda/api.h"

#include <atomic>
#include <cstdio>
#include <cstring>

#include "cuda/error.h"

namespace kvstrata::cuda {
namespace {

constexpr int kTextBytes = 512;
thread_local char last_error[kTextBytes] = "";

// The first sticky error of the process: 0 none, 1 being written, 2 written.
std::atomic<int> sticky_state{0};
char sticky_error[kTextBytes] = "";

// After these the context is lost and every later call fails too, whatever it does.
bool is_sticky(cudaError_t code) {
    switch (code) {
        case cudaErrorIllegalAddress:
        case cudaErrorLaunchTimeout:
        case cudaErrorHardwareStackError:
        case cudaErrorIllegalInstruction:
        case cudaErrorMisalignedAddress:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorLaunchFailure:
        case cudaErrorAssert:
        case cudaErrorECCUncorrectable: return true;
        default: return false;
    }
}

}  // namespace

int failed(cudaError_t code, const char* call, const char* file, int line) {
    cudaGetLastError();  // a failure that is not sticky must not surface again in an unrelated check
    const int used = std::snprintf(last_error, kTextBytes, "%s at %s:%d: %s (%d)", call, file, line,
                                   cudaGetErrorString(code), static_cast<int>(code));
    int none = 0;
    if (is_sticky(code) && sticky_state.compare_exchange_strong(none, 1)) {
        std::memcpy(sticky_error, last_error, kTextBytes);
        sticky_state.store(2, std::memory_order_release);
    } else if (sticky_state.load(std::memory_order_acquire) == 2 && used > 0 && used < kTextBytes) {
        std::snprintf(last_error + used, static_cast<size_t>(kTextBytes - used), ", after: %s", sticky_error);
    }
    return static_cast<int>(code);
}

int refused(const char* op, const char* reason) {
    std::snprintf(last_error, kTextBytes, "%s: %s", op, reason);
    return kInvalid;
}

}  // namespace kvstrata::cuda

int kvstrata_cuda_abi_version() { return kvstrata::cuda::kAbiVersion; }

int kvstrata_cuda_device_count(int* count) {
    *count = 0;
    KV_CUDA_TRY(cudaGetDeviceCount(count));
    return 0;
}

int kvstrata_cuda_driver_version(int* version) {
    *version = 0;
    KV_CUDA_TRY(cudaDriverGetVersion(version));
    return 0;
}

int kvstrata_cuda_runtime_version(int* version) {
    *version = 0;
    KV_CUDA_TRY(cudaRuntimeGetVersion(version));
    return 0;
}

int kvstrata_cuda_use_device(int index, int* before) {
    KV_CUDA_TRY(cudaGetDevice(before));
    if (*before != index) KV_CUDA_TRY(cudaSetDevice(index));
    return 0;
}

const char* kvstrata_cuda_error_string(int code) {
    if (code == kvstrata::cuda::kInvalid) return "an argument was refused";
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

const char* kvstrata_cuda_last_error() { return kvstrata::cuda::last_error; }
