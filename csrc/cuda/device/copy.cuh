// Asynchronous copies from global to shared memory, 16 bytes each. A thread waits for its own copies; others' need a barrier
// after that wait.
#pragma once

#include "cuda/device/launch.cuh"

namespace kvstrata::cuda {

// Both addresses are multiples of 16. The source does not pass through L1.
__device__ inline void copy_async16(void* shared, const void* global) {
#if defined(KVSTRATA_EMULATE)
    emulate::copy_async(shared, global, 16);
#else
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}

// Closes a group of the copies since the last commit; an empty group counts.
__device__ inline void copy_async_commit() {
#if defined(KVSTRATA_EMULATE)
    emulate::copy_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the N latest groups of this thread are under way.
template <int N>
__device__ inline void copy_async_wait() {
#if defined(KVSTRATA_EMULATE)
    emulate::copy_async_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Asks for the line of 128 bytes around an address to be brought to L2; a hint.
__device__ inline void prefetch_to_l2(const void* global) {
#if defined(KVSTRATA_EMULATE)
    static_cast<void>(global);
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#endif
}

}  // namespace kvstrata::cuda
