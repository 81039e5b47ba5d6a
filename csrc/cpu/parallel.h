// parallel: the only way work is spread over threads.
//
// It borrows the OpenMP team of the process (torch's) where there is one: a second set of threads would fight torch's
// workers, which spin for milliseconds after each operator. It links no runtime itself. Without one, or in a child
// after fork() (where GNU OpenMP hangs), it uses a small pool of its own.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

namespace kvstrata::cpu {

// Runs body(context, unit, worker) once for each unit in 0..units-1, in any order, on at most `threads` threads; worker
// is in 0..threads-1 and no two running bodies share one. The caller takes part. Returns when all units are done.
using Body = void (*)(void* context, int64_t unit, int worker) noexcept;
void parallel(int64_t units, int threads, Body body, void* context);

template <class F>
void parallel(int64_t units, int threads, F&& f) {
    using Call = std::remove_reference_t<F>;
    parallel(
        units, threads,
        [](void* context, int64_t unit, int worker) noexcept { (*static_cast<Call*>(context))(unit, worker); },
        const_cast<void*>(static_cast<const void*>(&f)));
}

// Whose threads the next call will use: "libgomp.so.1 (torch)", "libomp.so", "own pool".
std::string threads_source();

// Tests and diagnosis: use the own pool even where an OpenMP runtime is loaded.
void prefer_own_pool(bool own);

}  // namespace kvstrata::cpu
