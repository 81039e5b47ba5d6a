// The OpenMP runtime that is already in the process, if any.
#pragma once

#include <string>

namespace kvstrata::cpu {

// GNU's entry point for a parallel region; LLVM's and Intel's runtimes export it too.
using ParallelRegion = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

struct OpenMp {
    ParallelRegion region = nullptr;  // null: none is loaded
    std::string name;                 // "libgomp.so.1 (torch)"
};

// Looks among the loaded libraries, again whenever one was loaded since; cheap in between. Never loads anything.
const OpenMp& loaded_openmp();

}  // namespace kvstrata::cpu
