#include "bind/tensors.h"

#include "common/check.h"
#include "common/layout.h"
#include "ops/supported.h"

namespace kvstrata::bind {

static std::ostream& operator<<(std::ostream& out, const Place& place) {
    out << place.argument << "[" << place.i;
    if (place.j >= 0) out << ", " << place.j;
    return out << "]";
}

namespace {

std::string shape_text(const TensorView& view) {
    std::ostringstream out;
    for (int i = 0; i < view.dims; ++i) out << (i ? ", " : "[") << view.shape[i];
    out << (view.dims ? "]" : "[]");
    return out.str();
}

std::string wanted_text(std::initializer_list<Dim> dims) {
    std::ostringstream out;
    const char* separator = "[";
    for (const Dim& d : dims) {
        out << separator << d.name;
        if (std::to_string(d.size) != d.name) out << "=" << d.size;
        separator = ", ";
    }
    out << "]";
    return out.str();
}

std::string types_text(std::initializer_list<DType> types) {
    std::ostringstream out;
    const char* separator = "";
    for (DType t : types) {
        out << separator << ops::name(t);
        separator = " or ";
    }
    return out.str();
}

std::string device_text(const Where& where) { return where.on_host() ? "cpu" : message("cuda:", where.index); }

py::tuple parts_of(const Call& call, const char* name, py::handle tensor) {
    const py::tuple parts = py::reinterpret_borrow<py::tuple>(tensor);
    check(py::isinstance<py::tuple>(tensor) && parts.size() == 6, call, ": ", name,
          " is not (pointer, shape, strides, dtype, device, stream)");
    return parts;
}

Where place_of(const py::tuple& parts) { return where_of(parts[4].cast<int>(), parts[5].cast<uintptr_t>()); }

int64_t count(const TensorView& view) {
    int64_t n = 1;
    for (int i = 0; i < view.dims; ++i) n *= view.shape[i];
    return n;
}

}  // namespace

Where where_of(int device, uintptr_t stream) {
    if (device == 0) return {};
    return {Device::cuda, device - 1, reinterpret_cast<void*>(stream)};
}

std::ostream& operator<<(std::ostream& out, const Call& call) { return out << call.op; }

Call::Call(const char* op, py::handle tensor) : op(op) {
    if (!tensor.is_none()) where = place_of(parts_of(*this, "tensor", tensor));
}

Argument::Argument(const Call& call, const char* name, py::handle tensor)
    : op_(call), name_(name), given_(!tensor.is_none()) {
    if (!given_) return;
    const py::tuple parts = parts_of(call, name, tensor);
    const py::tuple shape = parts[1], strides = parts[2];
    check(shape.size() <= kMaxDims && shape.size() == strides.size(), call, ": ", name, " has ", shape.size(),
          " dimensions, expected at most ", kMaxDims);
    view_.data = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
    view_.dims = static_cast<int>(shape.size());
    for (int i = 0; i < view_.dims; ++i) {
        view_.shape[i] = shape[i].cast<int64_t>();
        view_.strides[i] = strides[i].cast<int64_t>();
    }
    view_.dtype = static_cast<DType>(parts[3].cast<int>());
    view_.where = place_of(parts);
}

const Argument& Argument::expect_rank(std::initializer_list<const char*> dims) const {
    std::ostringstream wanted;
    for (const char* d : dims) wanted << (wanted.tellp() ? ", " : "[") << d;
    check(given_, op_, ": ", name_, " is missing, expected ", wanted.str(), "]");
    check(view_.dims == static_cast<int>(dims.size()), op_, ": ", name_, " is ", shape_text(view_), ", expected ",
          wanted.str(), "]");
    return *this;
}

const Argument& Argument::expect(std::initializer_list<DType> types, std::initializer_list<Dim> dims,
                                 const char* note) const {
    if (!given_) return *this;
    const Where &here = op_.where, &there = view_.where;
    check(there.device == here.device && there.index == here.index, op_, ": ", name_, " is on ", device_text(there),
          ", expected ", device_text(here));
    bool known = false;
    for (DType t : types) known |= t == view_.dtype;
    check(known, op_, ": ", name_, " has dtype ", ops::name(view_.dtype), ", expected ", types_text(types));
    bool same = view_.dims == static_cast<int>(dims.size());
    int i = 0;
    for (const Dim& d : dims) same = same && view_.shape[i++] == d.size;
    check(same, op_, ": ", name_, " is ", shape_text(view_), ", expected ", wanted_text(dims), *note ? " (" : "", note,
          *note ? ")" : "");
    const int last = view_.dims - 1;
    check(last < 0 || view_.strides[last] == 1 || view_.shape[last] <= 1 || !count(view_), op_, ": ", name_,
          " has stride ", last < 0 ? 0 : view_.strides[last], " in its last dimension, expected 1 (contiguous)");
    return *this;
}

const Argument& Argument::expect_contiguous() const {
    int64_t stride = 1;
    for (int i = view_.dims - 1; given_ && i >= 0 && count(view_); --i) {
        check(view_.shape[i] == 1 || view_.strides[i] == stride, op_, ": ", name_, " has stride ", view_.strides[i],
              " in dimension ", i, ", expected ", stride, " (contiguous)");
        stride *= view_.shape[i];
    }
    return *this;
}

void* workspace_of(const Call& op, const Argument& workspace, int64_t bytes) {
    const int64_t given = workspace.given() ? workspace.shape(0) : 0;
    check(given >= bytes, op, ": workspace has ", given, " bytes, expected at least ", bytes);
    check(reinterpret_cast<uintptr_t>(workspace.data<void>()) % 64 == 0, op, ": workspace is not 64-byte aligned");
    return workspace.data<void>();
}

Pools::Pools(const Call& op, const py::sequence& pools, bool quantized)
    : op_(op), count_(static_cast<int>(pools.size())) {
    check(count_ <= kMaxPools, op, ": pools has ", count_, " pools, expected at most ", kMaxPools);
    for (int i = 0; i < count_; ++i) {
        const py::tuple pool = pools[i];
        const py::sequence slabs = pool[3];
        Slabs& s = slabs_[i];
        PoolView& view = views_[i];
        view.format = static_cast<Format>(pool[0].cast<int>());
        s.head_dim = pool[1].cast<int>();
        view.stride = pool[2].cast<int64_t>();
        if (!is_full(view.format) && !quantized) {
            throw Unsupported(
                message(op, ": pools[", i, "] has format ", ops::name(view.format), ", expected f32, bf16 or f16"));
        }
        if (!is_full(view.format) && !quantizable(s.head_dim)) {
            throw Unsupported(message(op, ": pools[", i, "] of format ", ops::name(view.format), " has head_dim ",
                                      s.head_dim, ", expected a multiple of 16 in ", kMinQuantizedDim, " to ",
                                      kMaxHeadDim));
        }
        const int64_t least = page_bytes(view.format, s.head_dim);
        check(view.stride >= least && view.stride % 64 == 0, op, ": pools[", i, "] has a stride of ", view.stride,
              " bytes, expected a multiple of 64 of at least ", least);
        for (const py::handle slab : slabs) {
            const py::tuple parts = py::reinterpret_borrow<py::tuple>(slab);
            const uintptr_t data = parts[0].cast<uintptr_t>();
            check(data % 64 == 0, op, ": pools[", i, "] slab ", s.data.size(), " starts ", data % 64,
                  " bytes past a 64-byte boundary, expected none");
            s.data.push_back(reinterpret_cast<unsigned char*>(data));
            s.pages.push_back(parts[1].cast<int32_t>());
            s.positions.push_back(reinterpret_cast<int32_t*>(parts[2].cast<uintptr_t>()));
        }
        view.n_slabs = static_cast<int32_t>(s.data.size());
        view.slabs = s.data.data();
        view.positions = s.positions.data();
        const uintptr_t table = pool[4].cast<uintptr_t>();
        check((table == 0) == op.on_host() || s.data.empty(), op, ": pools[", i, "] is ", table ? "" : "not ",
              "on cuda, expected it where the tensors are");
        if (!table) continue;
        view.slabs = reinterpret_cast<unsigned char* const*>(table);
        view.positions = reinterpret_cast<int32_t* const*>(table) + s.data.size();
    }
}

void Pools::check_id(PageId id, int head_dim, Place place) const {
    check(id >= 0, op_, ": ", place, " is ", id, ", expected a page", place.j < 0 ? "" : " or -1");
    const int pool = page_pool(id), slab = page_slab(id), index = page_index(id);
    check(pool < count_, op_, ": ", place, " names pool ", pool, ", expected one of ", count_, " pools");
    const Slabs& s = slabs_[pool];
    check(slab < views_[pool].n_slabs, op_, ": ", place, " names slab ", slab, " of pool ", pool, ", expected one of ",
          views_[pool].n_slabs, " slabs");
    check(index < s.pages[slab], op_, ": ", place, " names page ", index, " of pool ", pool, " slab ", slab,
          ", expected one of ", s.pages[slab], " pages");
    check(s.head_dim == head_dim, op_, ": pools[", pool, "] has head_dim ", s.head_dim, ", expected ", head_dim);
}

int Pools::head_dim(PageId id) const { return id >= 0 && page_pool(id) < count_ ? slabs_[page_pool(id)].head_dim : 0; }

int Pools::head_dim() const {
    for (int i = 0; i < count_; ++i) {
        if (!slabs_[i].data.empty()) return slabs_[i].head_dim;
    }
    return 0;
}

void Pools::expect_head_dim(int head_dim) const {
    for (int i = 0; i < count_; ++i) {
        check(slabs_[i].data.empty() || slabs_[i].head_dim == head_dim, op_, ": pools[", i, "] has head_dim ",
              slabs_[i].head_dim, ", expected ", head_dim);
    }
}

void Pools::check_positions(const char* why) const {
    for (int i = 0; i < count_; ++i) {
        for (const int32_t* positions : slabs_[i].positions) {
            check(positions, op_, ": pools[", i, "] has no positions, expected them (", why, ")");
        }
    }
}

}  // namespace kvstrata::bind
