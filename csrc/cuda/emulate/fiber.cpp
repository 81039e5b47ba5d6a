#include "cuda/emulate/fiber.h"

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace kvstrata::cuda::emulate {
namespace {

constexpr size_t kStackBytes = 128 * 1024;  // touched only as deep as a kernel goes; a kernel's arguments lie on it
constexpr size_t kPageBytes = 4096;         // below each stack, unreadable: an overflow is a fault, not a wrong result
constexpr int kStacks = 1024;

unsigned char* stack_of(int index) {
    static unsigned char* stacks[kStacks] = {};
    if (stacks[index] == nullptr) {
        void* at =
            mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED || mprotect(at, kPageBytes, PROT_NONE) != 0) {
            std::fprintf(stderr, "kvstrata emulation: no memory for the stack of thread %d\n", index);
            std::abort();
        }
        stacks[index] = static_cast<unsigned char*>(at);
    }
    return stacks[index];
}

void tell_start([[maybe_unused]] Fiber& from, [[maybe_unused]] Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.shadow, to.stack, to.stack_bytes);
#endif
}
void tell_back([[maybe_unused]] Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.shadow, nullptr, nullptr);
#endif
}
void take_stack(Fiber& fiber, int index) {
    fiber.stack = stack_of(index) + kPageBytes;
    fiber.stack_bytes = kStackBytes - kPageBytes;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);  // frames of the launch before never returned
#endif
}

}  // namespace

void begin_fiber([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#endif
}

#if defined(__x86_64__)

// Saves what a call preserves, changes stacks, and returns on the other one.
extern "C" __attribute__((visibility("hidden"))) void kvstrata_emulate_switch(void** from, void* to);
asm(R"(
    .text
    .hidden kvstrata_emulate_switch
    .globl kvstrata_emulate_switch
    .type kvstrata_emulate_switch, @function
kvstrata_emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size kvstrata_emulate_switch, .-kvstrata_emulate_switch
)");

void start_fiber(Fiber& fiber, int index, void (*main)()) {
    take_stack(fiber, index);
    auto* top = reinterpret_cast<uintptr_t*>(stack_of(index) + kStackBytes);
    *--top = 0;  // main's caller: none
    *--top = reinterpret_cast<uintptr_t>(main);
    for (int i = 0; i < 6; ++i) *--top = 0;  // the saved registers
    fiber.stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to) {
    tell_start(from, to);
    kvstrata_emulate_switch(&from.stack_pointer, to.stack_pointer);
    tell_back(from);
}

#else

void start_fiber(Fiber& fiber, int index, void (*main)()) {
    take_stack(fiber, index);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack_of(index) + kPageBytes;
    fiber.context.uc_stack.ss_size = kStackBytes - kPageBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, main, 0);
}

void switch_fiber(Fiber& from, Fiber& to) {
    tell_start(from, to);
    swapcontext(&from.context, &to.context);
    tell_back(from);
}

#endif

}  // namespace kvstrata::cuda::emulate
