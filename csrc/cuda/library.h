// The CUDA library as the core sees it: a shared object that is opened on request, and never before.
#pragma once

#include <string>

namespace kvstrata::cuda {

// The ops of ops/backends.h run in this library from now on. MachineError where it cannot be opened, or is of another
// version.
void open(const std::string& path);
bool is_open();

}  // namespace kvstrata::cuda
