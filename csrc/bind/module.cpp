#include "bind/bind.h"
#include "common/check.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "kvstrata's native core: pages, ops on the CPU, and the data paths over them.";
    py::register_exception<kvstrata::Unsupported>(m, "Unsupported", PyExc_ValueError);
    py::register_exception<kvstrata::Invalid>(m, "Invalid", PyExc_ValueError);
    py::register_exception<kvstrata::MachineError>(m, "MachineError", PyExc_RuntimeError);
    kvstrata::bind::bind_isa(m);
    kvstrata::bind::bind_ops(m);
    kvstrata::bind::bind_formats(m);
    kvstrata::bind::bind_scores(m);
    kvstrata::bind::bind_choices(m);
    kvstrata::bind::bind_recall(m);
    kvstrata::bind::bind_store(m);
    kvstrata::bind::bind_faults(m);
    kvstrata::bind::bind_graph(m);
}
