// A selector of the caller's: what it may see travels by value, and so does what it chooses.
#include "bind/choose.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/layout.h"
#include "store/reading.h"

namespace kvstrata::bind {
namespace {

namespace py = pybind11;

// Memory that Python owns, zeros.
class Bytes {
  public:
    explicit Bytes(int64_t size) : bytes_(std::string(static_cast<size_t>(size), '\0')) {}
    unsigned char* data() { return reinterpret_cast<unsigned char*>(PyByteArray_AS_STRING(bytes_.ptr())); }
    const py::bytearray& object() const { return bytes_; }

  private:
    py::bytearray bytes_;
};

void ask(const py::object& choose, const ops::SelectParams& p) {
    const int64_t R = p.n_rows, G = p.group, D = p.head_dim, width = dtype_bytes(p.q_dtype);
    int64_t M = 0;
    for (int r = 0; r < R; ++r) M = std::max<int64_t>(M, p.rows[r].entries);
    const int64_t B = (M + kSlots - 1) / kSlots, size = summary_bytes(p.head_dim, p.kind);
    Bytes q(R * G * D * width), blocks(R * B * size), visible(R * M * 2), base(R * G * 4);
    for (int64_t r = 0; r < R; ++r) {
        const ops::SelectRow& row = p.rows[r];
        for (int64_t g = 0; g < G; ++g) {
            std::memcpy(q.data() + (r * G + g) * D * width,
                        static_cast<const unsigned char*>(row.q) + g * row.q_stride_g * width, D * width);
        }
        for (int64_t b = 0; b < (row.entries + kSlots - 1) / kSlots; ++b) {
            std::memcpy(blocks.data() + (r * B + b) * size, row.blocks[b], size);
        }
        const int first = std::min(row.first, row.entries);
        std::memcpy(visible.data() + (r * M + first) * 2, row.visible + first, (row.entries - first) * 2);
        std::memcpy(base.data() + r * G * 4, row.lse_base, G * 4);
    }
    const auto chosen = choose(R, G, D, M, static_cast<int>(p.q_dtype), p.scale, R > 0 ? p.rows[0].most : 0, q.object(),
                               blocks.object(), visible.object(), base.object())
                            .cast<std::vector<std::vector<int32_t>>>();
    check(static_cast<int64_t>(chosen.size()) == R, "choose: ", chosen.size(), " rows, expected ", R);
    for (int64_t r = 0; r < R; ++r) {
        ops::SelectRow& row = p.rows[r];
        const std::vector<int32_t>& of = chosen[r];
        check(static_cast<int>(of.size()) <= row.most, "choose: ", of.size(), " pages, expected at most ", row.most);
        for (int32_t e : of) check(e >= row.first && e < row.entries, "choose: page ", e, " of ", row.entries);
        std::copy(of.begin(), of.end(), row.selected);
        std::fill(row.selected + of.size(), row.selected + row.most, -1);
        row.count = static_cast<int32_t>(of.size());
    }
}

}  // namespace

store::Choose choose_by(const pybind11::object& choose) {
    if (choose.is_none()) return {};
    // Copies and ends of the function may be outside the interpreter's lock.
    const std::shared_ptr<py::object> held(new py::object(choose), [](py::object* object) {
        const py::gil_scoped_acquire acquire;
        delete object;
    });
    return [held](const ops::SelectParams& p) {
        const py::gil_scoped_acquire acquire;
        ask(*held, p);
    };
}

}  // namespace kvstrata::bind
