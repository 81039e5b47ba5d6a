#include "cuda/library.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "common/check.h"
#include "cuda/api.h"
#include "ops/backends.h"

namespace kvstrata::cuda {
namespace {

// The functions of an open library, null where it lacks one.
struct Library {
#define KV_FIELD(op, Params) int (*op)(const ops::Params*, void*) = nullptr;
    KV_OPS(KV_FIELD)
#undef KV_FIELD
#define KV_FIELD(op, Params) int64_t (*op##_workspace_bytes)(const ops::Params*) = nullptr;
    KV_OPS_IN_WORKSPACE(KV_FIELD)
#undef KV_FIELD
    int (*upload)(const ops::Piece*, int64_t, void*) = nullptr;
    int (*copy)(const ops::Block*, void*) = nullptr;
    int (*download)(void*, const void*, int64_t, void*) = nullptr;
    int (*use_device)(int, int*) = nullptr;
    const char* (*last_error)() = nullptr;
};

constinit std::atomic<const Library*> current{nullptr};

const Library& library(const char* op) {
    const Library* open = current.load(std::memory_order_acquire);
    if (!open) throw MachineError(message(op, ": the CUDA library is not open"));
    return *open;
}

template <class Function>
void find(void* handle, const std::string& name, Function*& out) {
    out = reinterpret_cast<Function*>(dlsym(handle, ("kvstrata_cuda_" + name).c_str()));
}

template <class Function>
Function* present(const char* op, Function* function) {
    if (!function) throw Unsupported(message(op, ": the CUDA library has no such op"));
    return function;
}

void raise(const char* op, const Library& from, int code) {
    if (code == kInvalid) throw Unsupported(from.last_error());
    throw MachineError(message(op, ": ", from.last_error()));
}

// The calling thread's device, for the time of a call.
class OnDevice {
  public:
    OnDevice(const char* op, const Library& from, int index) : from_(from), index_(index) {
        if (const int code = from.use_device(index, &before_)) raise(op, from, code);
    }
    ~OnDevice() {
        int unused = 0;
        if (before_ != index_) from_.use_device(before_, &unused);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    const Library& from_;
    const int index_;
    int before_ = 0;
};

template <class Function, class... Parts>
void run(const char* op, Function* Library::* function, const Where& where, Parts... parts) {
    const Library& from = library(op);
    const auto work = present(op, from.*function);
    const OnDevice device(op, from, where.index);
    if (const int code = work(parts..., where.stream)) raise(op, from, code);
}

template <class Params>
int64_t bytes(const char* op, int64_t (*Library::*function)(const Params*), const Params& params) {
    return present(op, library(op).*function)(&params);
}

}  // namespace

void open(const std::string& path) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) throw MachineError(message("CUDA library: ", dlerror()));
    int (*abi_version)() = nullptr;
    find(handle, "abi_version", abi_version);
    const int abi = abi_version ? abi_version() : 0;
    if (abi != kAbiVersion) {
        throw MachineError(message("CUDA library: ", path, " has version ", abi, ", expected ", kAbiVersion));
    }
    auto opened = std::make_unique<Library>();
    find(handle, "upload", opened->upload);
    find(handle, "copy", opened->copy);
    find(handle, "download", opened->download);
    find(handle, "use_device", opened->use_device);
    find(handle, "last_error", opened->last_error);
#define KV_FIND(op, Params) find(handle, #op, opened->op);
    KV_OPS(KV_FIND)
#undef KV_FIND
#define KV_FIND(op, Params) find(handle, #op "_workspace_bytes", opened->op##_workspace_bytes);
    KV_OPS_IN_WORKSPACE(KV_FIND)
#undef KV_FIND
    current.store(opened.release(), std::memory_order_release);  // lives as long as the process, as its code does
}

bool is_open() { return current.load(std::memory_order_acquire) != nullptr; }

void upload(std::span<const ops::Piece> pieces, const Where& where) {
    const auto n = static_cast<int64_t>(pieces.size());
    if (n > 0) run("upload", &Library::upload, where, pieces.data(), n);
}

void copy(const ops::Block& block, const Where& where) { run("copy", &Library::copy, where, &block); }

void download(void* to, const void* from, int64_t bytes, const Where& where) {
    run("download", &Library::download, where, to, from, bytes);
}

#define KV_RUN(op, Params) \
    void op(const ops::Params& params, const Where& where) { run(#op, &Library::op, where, &params); }
KV_OPS(KV_RUN)
#undef KV_RUN

#define KV_BYTES(op, Params)                                       \
    int64_t op##_workspace_bytes(const ops::Params& params) {      \
        return bytes(#op, &Library::op##_workspace_bytes, params); \
    }
KV_OPS_IN_WORKSPACE(KV_BYTES)
#undef KV_BYTES

}  // namespace kvstrata::cuda
