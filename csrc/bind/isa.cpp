// What runs here: instruction-set levels, whose threads, settings.
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bind/bind.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cuda/library.h"
#include "ops/settings.h"

namespace kvstrata::bind {

namespace py = pybind11;

void bind_isa(py::module_& m) {
    m.def("isa", [] { return cpu::levels()[static_cast<int>(cpu::active_isa())].name; });
    m.def("isa_levels", [] {  // (name, available, why not, level whose kernels it runs)
        py::list levels;
        for (const cpu::LevelInfo& level : cpu::levels()) {
            levels.append(py::make_tuple(level.name, level.available, level.reason, level.kernels));
        }
        return levels;
    });
    m.def(
        "isa_obstacle",  // why a machine with these facts lacks a level, given that it has all below it
        [](int level, const std::array<uint32_t, 5>& words, uint64_t states, bool tiles_granted) {
            const auto [basic_c, more_b, more_c, more_d, sub_a] = words;
            return cpu::obstacle(static_cast<cpu::Isa>(level),
                                 {basic_c, more_b, more_c, more_d, sub_a, states, tiles_granted});
        },
        py::arg("level"), py::arg("words"), py::arg("states"), py::arg("tiles_granted"));
    m.def("set_isa", &cpu::use_isa, py::arg("level"));
    m.def("threads_source", &cpu::threads_source);
    m.def("prefer_own_pool", &cpu::prefer_own_pool, py::arg("own"));
    m.def("open_cuda", &cuda::open, py::arg("path"));
    m.def("cuda_is_open", &cuda::is_open);
    m.def("settings", [] {
        py::dict d;
        d["isa"] = settings().isa;
        d["check"] = settings().check;
        d["log"] = settings().log;
        return d;
    });
}

}  // namespace kvstrata::bind
