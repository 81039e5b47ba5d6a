// The functions of the CUDA runtime that the library calls, with one device whose memory is the host's.
#include <cstring>

#include "cuda/emulate/emulate.h"

namespace {
constexpr int kMultiprocessors = 2;  // few: a kernel that shares its work among them shows it in small tests
constexpr int kSharedOfMultiprocessor = 164 * 1024;
}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {  // launches have ended when they return
    return kvstrata::cuda::emulate::wait("cudaStreamSynchronize");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: return *value = kMultiprocessors, cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return *value = kSharedOfMultiprocessor, cudaSuccess;
        default: return cudaErrorInvalidValue;
    }
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t code) {
    switch (code) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        default: return "an error that the emulation does not know";
    }
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t count, cudaStream_t) {
    return kvstrata::cuda::emulate::ask("cudaMemsetAsync", [=] { return std::memset(at, value, count), cudaSuccess; });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind, cudaStream_t) {
    return kvstrata::cuda::emulate::ask("cudaMemcpyAsync", [=] { return std::memmove(to, from, count), cudaSuccess; });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
    return kvstrata::cuda::emulate::ask("cudaMemcpy2DAsync", [=] {
        for (size_t i = 0; i < height; ++i) {
            std::memmove(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
        }
        return cudaSuccess;
    });
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

}  // extern "C"
