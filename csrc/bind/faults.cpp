// Faults for tests.
#include "bind/bind.h"
#include "common/fault.h"
#include "store/trouble.h"

namespace py = pybind11;

namespace kvstrata::bind {

void bind_faults(py::module_& m) {
    m.def("arm_fault", [](const std::string& point, int nth) { fault::arm(point.c_str(), nth); });
    m.def("disarm_fault", [] { fault::arm(nullptr, 0); });
    m.def("fault_visits", &fault::visits);
    m.def(
        "begin_trouble",
        [](uint64_t seed, float fail, float part, float cut, float change, float stay, int delay_us) {
            store::trouble::begin({seed, fail, part, cut, change, stay, delay_us});
        },
        py::arg("seed"), py::arg("fail"), py::arg("part"), py::arg("cut"), py::arg("change"), py::arg("stay"),
        py::arg("delay_us"));
    m.def("end_trouble", &store::trouble::end);
}

}  // namespace kvstrata::bind
