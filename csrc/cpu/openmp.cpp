#include "cpu/openmp.h"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace kvstrata::cpu {
namespace {

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::vector<std::string> loaded_libraries() {
    std::vector<std::string> paths;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
            if (info->dlpi_name && *info->dlpi_name)
                static_cast<std::vector<std::string>*>(out)->push_back(info->dlpi_name);
            return 0;
        },
        &paths);
    return paths;
}

// How many libraries this process has ever loaded: tells whether it is worth looking again.
unsigned long long libraries_added() {
    unsigned long long added = 0;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
            *static_cast<unsigned long long*>(out) = info->dlpi_adds;
            return 1;
        },
        &added);
    return added;
}

// The symbol as a loaded library (or what it depends on) sees it. torch loads its runtime RTLD_LOCAL, so the global
// scope does not help; RTLD_NOLOAD never loads anything. The handle is kept: the library must not go away under us.
OpenMp region_of(const std::string& path, const char* owner) {
    void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return {};
    OpenMp found;
    found.region = reinterpret_cast<ParallelRegion>(dlsym(library, "GOMP_parallel"));
    Dl_info where;
    if (found.region && dladdr(reinterpret_cast<void*>(found.region), &where) && where.dli_fname) {
        found.name = base_name(where.dli_fname) + owner;
    }
    if (!found.region) dlclose(library);
    return found;
}

OpenMp search() {
    const std::vector<std::string> paths = loaded_libraries();
    for (const std::string& path : paths) {  // torch's own, if it is here: its workers are the ones to share
        if (base_name(path).rfind("libtorch_cpu", 0) != 0) continue;
        OpenMp found = region_of(path, " (torch)");
        if (found.region) return found;
    }
    for (const std::string& path : paths) {
        if (base_name(path).find("omp") == std::string::npos) continue;  // libgomp, libomp, libiomp5
        OpenMp found = region_of(path, "");
        if (found.region) return found;
    }
    return {};
}

}  // namespace

const OpenMp& loaded_openmp() {
    static const OpenMp none;
    static std::atomic<const OpenMp*> found{nullptr};
    static std::atomic<unsigned long long> seen{0};
    static std::mutex searching;
    if (const OpenMp* known = found.load(std::memory_order_acquire)) return *known;
    const unsigned long long added = libraries_added();
    if (seen.load(std::memory_order_acquire) == added) return none;
    std::lock_guard<std::mutex> lock(searching);
    if (const OpenMp* known = found.load(std::memory_order_acquire)) return *known;
    OpenMp result = search();
    if (result.region) {
        found.store(new OpenMp(std::move(result)), std::memory_order_release);  // for the life of the process
        return *found.load(std::memory_order_acquire);
    }
    seen.store(added, std::memory_order_release);
    return none;
}

}  // namespace kvstrata::cpu
