// The functions of the CUDA runtime that the library calls, with one device whose memory is the host's.
#include <cuda_runtime.h>

#include <cstring>

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t code) {
    switch (code) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        default: return "an error that the emulation does not know";
    }
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t count, cudaStream_t) {
    return std::memset(at, value, count), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind, cudaStream_t) {
    return std::memmove(to, from, count), cudaSuccess;
}

}  // extern "C"
