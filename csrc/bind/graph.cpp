// Steps of a Store that do not change what they launch, for Python.
#include <pybind11/stl.h>

#include "bind/bind.h"
#include "bind/calls.h"
#include "store/store.h"

namespace py = pybind11;

namespace kvstrata::bind {

void bind_graph(py::module_& m) {
    using store::Layout;
    using store::Store;
    py::class_<Layout>(m, "Layout").def_readonly("epoch", &Layout::epoch);
    m.def(
        "make_layout", [](Store&) { return std::make_unique<Layout>(); },
        py::keep_alive<0, 1>());  // its memory goes back to the store
    m.def("lay_out", [](Store& s, Layout& layout, int entries) {
        const py::gil_scoped_release release;
        s.lay_out(layout, entries);
    });
    m.def("attend_laid",
          [](Store& s, const Layout& layout, int layer, const Strides& q, const Strides& k, const Strides& v,
             const Strides& out, Address sinks, int out_dtype, float scale, float softcap) {
              const py::gil_scoped_release release;
              s.attend_laid(layout, layer, tensor(k), tensor(v), call(q, out, {}, sinks, out_dtype, scale, softcap, 1));
          });
}

}  // namespace kvstrata::bind
