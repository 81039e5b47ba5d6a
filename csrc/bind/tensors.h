// Tensors and pools as Python hands them over, and the checks of their shapes.
//
// A tensor is the tuple (pointer, shape, strides in elements, dtype, device, stream) of plain ints, device 0 the CPU and
// 1 + i CUDA's device i; a pool is (format, head_dim, stride in bytes, [(pointer, pages, positions pointer), ...], table),
// where the table, 0 on the CPU, is CUDA's own copy of the list: so many pointers to slabs, then to positions. Neither
// torch nor numpy is needed to make one.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <vector>

#include "common/view.h"
#include "ops/pool_view.h"

namespace kvstrata::bind {

namespace py = pybind11;

struct Dim {
    const char* name;
    int64_t size;
};

Where where_of(int device, uintptr_t stream = 0);  // by a device's number as tensors have it

// An op that is called, and where it runs: on the CPU, or where a tensor lies.
struct Call {
    Call(const char* op) : op(op) {}  // NOLINT: an op's name is such a call
    Call(const char* op, py::handle tensor);

    bool on_host() const { return where.on_host(); }

    const char* op;
    Where where = {};
};
std::ostream& operator<<(std::ostream& out, const Call& call);

// One argument of an op. Every message names op, argument, expected and actual.
class Argument {
  public:
    Argument(const Call& call, const char* name, py::handle tensor);  // None: absent

    bool given() const { return given_; }
    int64_t shape(int i) const { return view_.shape[i]; }
    int64_t stride(int i) const { return view_.strides[i]; }
    DType dtype() const { return view_.dtype; }

    // Where the op runs, of one of the types, of this shape, last dimension contiguous. `note` says what set the sizes.
    const Argument& expect(std::initializer_list<DType> types, std::initializer_list<Dim> dims,
                           const char* note = "") const;
    const Argument& expect_rank(std::initializer_list<const char*> dims) const;
    const Argument& expect_contiguous() const;

    // Row i of dimension 0, or null if the argument is absent.
    template <class T>
    T* row(int64_t i) const {
        return given_ ? reinterpret_cast<T*>(bytes() + i * view_.strides[0] * dtype_bytes(view_.dtype)) : nullptr;
    }
    template <class T>
    T* data() const {
        return given_ ? static_cast<T*>(view_.data) : nullptr;
    }

  private:
    unsigned char* bytes() const { return static_cast<unsigned char*>(view_.data); }
    Call op_;
    const char* name_;
    bool given_;
    TensorView view_;
};

// The memory of a workspace of at least so many bytes, 64-byte aligned.
void* workspace_of(const Call& op, const Argument& workspace, int64_t bytes);

// Where an element stands, as messages show it: pages[2, 5], or pages[2] where j is -1.
struct Place {
    const char* argument;
    int64_t i;
    int64_t j = -1;
};

// The pools of a call, and what their page ids may be.
class Pools {
  public:
    // `quantized`: whether the op also takes pools of quantized formats.
    Pools(const Call& op, const py::sequence& pools, bool quantized = false);

    const PoolView* views() const { return views_; }

    // Throws unless `id` is a page of a pool whose head_dim is D. The id has been read on the CPU.
    void check_id(PageId id, int head_dim, Place place) const;
    void check_positions(const char* why) const;  // every pool has them
    int head_dim(PageId id) const;                // of the page's pool; 0 if there is no such pool
    int head_dim() const;                         // of the first pool that has slabs, or 0
    // Where ids cannot be read: every pool that has slabs is of this head_dim.
    void expect_head_dim(int head_dim) const;

  private:
    struct Slabs {
        int head_dim = 0;
        std::vector<unsigned char*> data;
        std::vector<int32_t*> positions;
        std::vector<int32_t> pages;
    };
    Call op_;
    int count_ = 0;
    Slabs slabs_[kMaxPools];
    PoolView views_[kMaxPools] = {};
};

}  // namespace kvstrata::bind
