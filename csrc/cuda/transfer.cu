// Bytes on their way (ops/transfer.h): lists from the host travel as kernel arguments, so that no staging memory has to
// outlive a copy and the source may change as soon as the call returns.
#include <cstring>

#include "cuda/api.h"
#include "cuda/device/launch.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kUploadThreads = 128;
constexpr int64_t kByLaunches = 128 * 1024;  // bytes of a piece that still travel with launches
constexpr int kUploadPieces = 128;
constexpr int kUploadBytes = 14 * 1024;  // with the pieces under 16 KiB of arguments

// What one launch writes: piece i is so many bytes from data[from[i]] on, and goes to to[i].
struct Load {
    unsigned char* to[kUploadPieces];
    uint16_t from[kUploadPieces], bytes[kUploadPieces];
    int32_t count;
    alignas(4) unsigned char data[kUploadBytes];
};

// One block writes one piece. Lists are of 1, 2 or 4 byte elements, each naturally aligned at both ends.
__global__ void __launch_bounds__(kUploadThreads) write_load(const __grid_constant__ Load load) {
    const int piece = static_cast<int>(blockIdx.x);
    const int first = load.from[piece], bytes = load.bytes[piece];
    unsigned char* const to = load.to[piece];
    const bool words = ((reinterpret_cast<uintptr_t>(to) | static_cast<unsigned>(bytes)) & 3u) == 0;
    for (int i = static_cast<int>(threadIdx.x); i < (words ? bytes / 4 : bytes); i += kUploadThreads) {
        if (words) {
            reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(load.data + first)[i];
        } else {
            to[i] = load.data[first + i];
        }
    }
}

int flush(Load& load, cudaStream_t stream) {
    if (load.count == 0) return 0;
    const dim3 grid(static_cast<unsigned>(load.count));
    const int code = launch("upload", write_load, grid, dim3(kUploadThreads), 0, stream, load);
    load.count = 0;
    return code;
}

}  // namespace
}  // namespace kvstrata::cuda

int kvstrata_cuda_upload(const kvstrata::ops::Piece* pieces, int64_t n, void* stream) {
    using namespace kvstrata::cuda;
    const auto on = static_cast<cudaStream_t>(stream);
    Load load;
    load.count = 0;
    int used = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (pieces[i].bytes > kByLaunches) {  // from pageable memory: it has been read when the call returns
            KV_CUDA_TRY(cudaMemcpyAsync(pieces[i].to, pieces[i].from, static_cast<size_t>(pieces[i].bytes),
                                        cudaMemcpyHostToDevice, on));
            continue;
        }
        for (int64_t done = 0; done < pieces[i].bytes;) {
            if (load.count == kUploadPieces || used >= kUploadBytes) {
                if (const int code = flush(load, on)) return code;
                used = 0;
            }
            const int64_t left = pieces[i].bytes - done, room = kUploadBytes - used;
            const int part = static_cast<int>(left < room ? left : room);
            std::memcpy(load.data + used, static_cast<const unsigned char*>(pieces[i].from) + done,
                        static_cast<size_t>(part));
            load.to[load.count] = static_cast<unsigned char*>(pieces[i].to) + done;
            load.from[load.count] = static_cast<uint16_t>(used);
            load.bytes[load.count++] = static_cast<uint16_t>(part);
            done += part;
            used = (used + part + 3) / 4 * 4;  // the next piece's words are aligned
        }
    }
    return flush(load, on);
}

int kvstrata_cuda_copy(const kvstrata::ops::Block* block, void* stream) {
    const kvstrata::ops::Block& b = *block;
    if (b.bytes == 0 || b.rows == 0) return 0;
    const auto on = static_cast<cudaStream_t>(stream);
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    if (b.rows == 1) {
        KV_CUDA_TRY(cudaMemcpyAsync(b.to, b.from, size(b.bytes), cudaMemcpyDeviceToDevice, on));
        return 0;
    }
    KV_CUDA_TRY(cudaMemcpy2DAsync(b.to, size(b.to_stride), b.from, size(b.from_stride), size(b.bytes), size(b.rows),
                                  cudaMemcpyDeviceToDevice, on));
    return 0;
}

int kvstrata_cuda_download(void* to, const void* from, int64_t bytes, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (bytes > 0) KV_CUDA_TRY(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, on));
    KV_CUDA_TRY(cudaStreamSynchronize(on));
    return 0;
}
