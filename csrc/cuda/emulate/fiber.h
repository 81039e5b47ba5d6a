// A fiber: a stack and a place to go on. Private to the emulation.
#pragma once

#include <cstddef>

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
    // For AddressSanitizer, which must know of every change of stacks.
    const void* stack = nullptr;
    size_t stack_bytes = 0;
    void* shadow = nullptr;
};

// Makes `fiber` begin at `main`, which never returns, on pooled stack `index` (0..1023; the pool is never given back).
void start_fiber(Fiber& fiber, int index, void (*main)());
void switch_fiber(Fiber& from, Fiber& to);
// The first thing that `main` does; `from` started it.
void begin_fiber(Fiber& from);

}  // namespace kvstrata::cuda::emulate
