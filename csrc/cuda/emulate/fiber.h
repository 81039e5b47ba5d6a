// A fiber: a stack and a place to go on. Private to the emulation.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace kvstrata::cuda::emulate {

struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

// Makes `fiber` begin at `main`, which never returns, on pooled stack `index` (0..1023; the pool is never given back).
void start_fiber(Fiber& fiber, int index, void (*main)());
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace kvstrata::cuda::emulate
