// Store for Python: sets of pages, what moves when a view changes, and rows that are kept elsewhere.
#include <pybind11/stl.h>

#include "bind/sets.h"
#include "common/checksum.h"

namespace py = pybind11;
using namespace kvstrata;
using store::SeqId;
using store::Store;

namespace kvstrata::bind {
namespace {

using Address = uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

// Pages that lie in a file of others: their ids, by places.
std::vector<PageId> lend_named(Store& s, int pool, int file, int64_t offset, Address positions,
                               const std::vector<int32_t>& places, const std::vector<uint64_t>& sums,
                               const std::string& name) {
    const int slab = s.lend_named(pool, file, offset, reinterpret_cast<int32_t*>(positions), places, sums, name);
    std::vector<PageId> pages;
    for (size_t i = 0; i < places.size(); ++i) pages.push_back(make_page(pool, slab, static_cast<int>(i)));
    return pages;
}

// A row that was kept elsewhere; centre: frozen, and its mean.
void restore_row(Store& s, SeqId seq, int layer, int head, const std::vector<int32_t>& pool,
                 const std::vector<uint16_t>& alive, const std::vector<pages::SetTag>& set, int sealed, Address payload,
                 int64_t payload_bytes, Address positions, const std::tuple<bool, std::vector<float>>& centre,
                 const std::vector<PageId>& page) {
    const auto& [frozen, mean] = centre;
    s.restore_row(seq, layer, head,
                  {pool, alive, set, sealed, page, reinterpret_cast<const unsigned char*>(payload), payload_bytes,
                   reinterpret_cast<const int32_t*>(positions), frozen, mean});
}

py::tuple centre(const Store& s, SeqId seq, int layer, int head) {
    const store::Centre found = s.centre_of(seq, layer, head);
    return py::make_tuple(found.frozen, found.mean ? *found.mean : std::vector<float>{});
}

// Of pages that lie one behind the other.
void checksums(Address pages, int64_t page_bytes, int64_t n, Address out) {
    const py::gil_scoped_release release;
    for (int64_t i = 0; i < n; ++i) {
        const auto* const page = reinterpret_cast<const unsigned char*>(pages) + i * page_bytes;
        reinterpret_cast<uint64_t*>(out)[i] = checksum(page, page_bytes);
    }
}

}  // namespace

void bind_sets(py::module_& m, py::class_<Store>& store) {
    store
        .def("set_view", [](Store& s, SeqId seq, bool all, const std::vector<pages::SetTag>& sets,
                            bool halves) { s.set_view(seq, {all, halves, sets}); })
        .def("view",
             [](const Store& s, SeqId seq) {
                 const pages::View& view = s.sequence(seq).view;
                 return py::make_tuple(view.all, view.sets, view.halves);
             })
        .def("show", &Store::show)
        .def("moving", &Store::moving)
        .def("bring", &Store::bring, NoGil())
        .def("put_aside", &Store::put_aside, NoGil())
        .def("give_way", &Store::give_way)
        .def("bring_ahead", &Store::bring_ahead)
        .def("land", &Store::land, NoGil())
        .def("end_ahead", &Store::end_ahead, NoGil())
        .def("ahead", &Store::ahead)
        .def("stop_reading", &Store::stop_reading, NoGil())
        .def_property_readonly("moved_bytes", &Store::moved_bytes)
        .def("look_sets",
             [](Store& s, int layer, const std::vector<SeqId>& seqs, Address out, int64_t columns) {
                 s.look_sets(layer, seqs, reinterpret_cast<pages::SetTag*>(out), columns);
             })
        .def("row_sets",
             [](const Store& s, SeqId seq, int layer, int head) {
                 const pages::Row& r = s.row(seq, layer, head);
                 return py::make_tuple(r.set, r.aside, r.back);
             })
        .def("lend_named", &lend_named)
        .def("centre", &centre)
        .def("copy_out",
             [](Store& s, SeqId seq, int layer, int head, const std::vector<int32_t>& entries, Address payload,
                Address positions) {
                 s.copy_out(seq, layer, head, entries, reinterpret_cast<unsigned char*>(payload),
                            reinterpret_cast<int32_t*>(positions));
             })
        .def("restore_row", &restore_row, py::arg("seq"), py::arg("layer"), py::arg("head"), py::arg("pools"),
             py::arg("alive"), py::arg("sets"), py::arg("sealed"), py::arg("payload"), py::arg("nbytes"),
             py::arg("positions"), py::arg("centre"), py::arg("page") = std::vector<PageId>{})
        .def("restore_length", &Store::restore_length);
    m.def("checksums", &checksums);
}

}  // namespace kvstrata::bind
