// The CUDA execution model on one CPU thread, so that kernels are tested where no GPU is. Only with KVSTRATA_EMULATE.
//
// Blocks run one after another. The threads of a block are fibers that run until they wait: at __syncthreads, __syncwarp,
// shuffles, votes and matrix products. What CUDA leaves undefined ends the process with a message on stderr that names the
// launch, the block and the threads: a barrier that not all can reach, a lane outside its mask, lanes of one collective at
// different places, a write past the dynamic shared memory, a misaligned asynchronous copy. What CUDA leaves unwritten is
// 0xFF bytes (NaN): dynamic shared memory before every block, static shared memory in the first blocks of a launch, the target
// of an asynchronous copy until it is waited for, what a shuffle reads from a lane outside the mask.
//
// Kernels and device functions that declare __shared__ variables lie in an anonymous namespace. Not emulated: several blocks
// at once (a block that waits for a later one hangs), memory order, launch bounds, the hardware's rounding inside an mma and in
// fast functions (__expf, rsqrtf).
//
// By hand, without CMake (-DKVSTRATA_EMULATE is all that the sources need; an object per file compiles faster):
//   g++ -std=c++20 -O1 -g -fPIC -shared -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -Wno-format-truncation
//       -DKVSTRATA_EMULATE -Icsrc -isystem /usr/local/cuda/include -x c++ csrc/cuda/*.cu csrc/cuda/emulate/*.cu
//       csrc/cuda/emulate/*.cpp -o build/libkvstrata_cuda_emulated.so
// With -fsanitize=address,undefined (and libasan preloaded into Python) an access outside a tensor shows too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <tuple>

#undef __shared__
#undef __launch_bounds__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("kvstrata_shared")))

// Set for the running thread at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace kvstrata::cuda::emulate {

using Place = std::source_location;

// What all lanes of `mask` (or all threads of the block) bring: each its own slot, which `finish` reads and writes when the
// last has come. Slots of lanes outside the mask are null; a block's are in order of threads, those that returned left out.
void warp_collective(const char* name, unsigned mask, void* slot, void (*finish)(void* const* slots, unsigned mask),
                     Place place);
void block_collective(const char* name, void* slot, void (*finish)(void* const* slots, int threads), Place place);

int lane();                                                  // of the running thread, 0..31
unsigned char* dynamic_shared();                             // of the running block
void copy_async(void* shared, const void* global, int n);    // n bytes, at the wait
void copy_async_commit();                                    // closes a group
void copy_async_wait(int pending);                           // all groups but the last `pending`
[[noreturn]] void fault(const char* what, const char* why);  // names the launch, the block and the thread

// What the host asks of the device: counted by name, and done; or, while a graph is captured, kept for its replays (graph.cpp).
cudaError_t ask(const char* name, std::function<cudaError_t()> work);
cudaError_t wait(const char* name);  // counted; refused while a graph is captured

// Runs body(context) as every thread of the grid; a cudaError for a shape that no device takes.
cudaError_t run(const char* op, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);

template <class... P, class... A>
cudaError_t launch(const char* op, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A&&... args) {
    struct Call {
        void (*kernel)(P...);
        std::tuple<P...> args;
    } call{kernel, std::tuple<P...>(static_cast<A&&>(args)...)};
    const auto body = [](void* context) {
        auto& c = *static_cast<Call*>(context);
        std::apply(c.kernel, c.args);
    };
    return ask(op, [=]() mutable { return run(op, grid, block, shared_bytes, body, &call); });
}

}  // namespace kvstrata::cuda::emulate

#include "cuda/emulate/arithmetic.h"
#include "cuda/emulate/collectives.h"
