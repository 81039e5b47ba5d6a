// CUDA graphs: what the host asks for between begin and end is kept with its arguments, and done at each replay, in order. And how
// often the host has asked for what. Only in the emulated library.
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/api.h"
#include "cuda/emulate/emulate.h"

namespace kvstrata::cuda::emulate {
namespace {

using Graph = std::vector<std::function<cudaError_t()>>;

std::mutex lock;  // of all below
std::map<std::string, int64_t, std::less<>> asked;
std::vector<Graph> graphs;
bool capturing = false;

}  // namespace

cudaError_t ask(const char* name, std::function<cudaError_t()> work) {
    {
        const std::lock_guard guard(lock);
        ++asked[name];
        if (capturing) return graphs.back().push_back(std::move(work)), cudaSuccess;
    }
    return work();
}

cudaError_t wait(const char* name) {
    const std::lock_guard guard(lock);
    ++asked[name];
    return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

}  // namespace kvstrata::cuda::emulate

using namespace kvstrata::cuda::emulate;

KVSTRATA_CUDA_API void kvstrata_emulated_begin_capture() {
    const std::lock_guard guard(lock);
    graphs.emplace_back();
    capturing = true;
}

// The number of the graph that ends.
KVSTRATA_CUDA_API int kvstrata_emulated_end_capture() {
    const std::lock_guard guard(lock);
    capturing = false;
    return static_cast<int>(graphs.size()) - 1;
}

KVSTRATA_CUDA_API int kvstrata_emulated_replay(int number) {
    Graph graph;
    {
        const std::lock_guard guard(lock);
        graph = graphs.at(static_cast<size_t>(number));
    }
    for (auto& work : graph) {
        if (const cudaError_t code = work(); code != cudaSuccess) return code;
    }
    return 0;
}

// Launches of an op, or calls of a function of the runtime that reach the device, since the process began; those kept count too.
KVSTRATA_CUDA_API int64_t kvstrata_emulated_asked(const char* name) {
    const std::lock_guard guard(lock);
    const auto found = asked.find(std::string_view(name));
    return found == asked.end() ? 0 : found->second;
}
