// Store for Python. The hot path takes bare ints: pointers and element strides, checked by the caller in Python.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bind/bind.h"
#include "bind/calls.h"
#include "bind/choose.h"
#include "bind/sets.h"
#include "bind/tensors.h"
#include "store/store.h"

namespace py = pybind11;
using namespace kvstrata;
using store::SeqId;
using store::Store;

namespace kvstrata::bind {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

using RecallTuple =
    std::tuple<int, int, float, int, int, int, float, int, float, int, int, int, double, int>;  // as store::Recall

store::Recall recall(const RecallTuple& r) {
    const auto [pages, near_pages, weight, aggregate, kind, most, mass, least, estimate, oracle, audit, flat, expand,
                reuse] = r;
    return {pages,
            near_pages,
            weight,
            static_cast<ops::Aggregate>(aggregate),
            static_cast<SummaryKind>(kind),
            most,
            mass,
            least,
            estimate,
            static_cast<store::Oracle>(oracle),
            flat,
            expand,
            reuse,
            audit};
}

std::unique_ptr<Store> create(const std::vector<std::tuple<int, int, int, int>>& layers, int dtype, int tail, int hold,
                              int sinks, const std::vector<int>& formats, int queries, bool scored, bool massed,
                              const RecallTuple& recalled, const std::vector<int>& dense, const std::vector<int>& far,
                              int ring, bool sets, int device, bool charged, bool centred) {
    std::vector<store::LayerShape> shapes;
    for (const auto& [kv, q, dim, window] : layers) shapes.push_back({kv, q, dim, window});
    store::Options options{static_cast<DType>(dtype), tail, hold, sinks, {}, queries, scored, massed};
    for (int f : formats) options.formats.push_back(static_cast<Format>(f));
    options.recall = recall(recalled);
    options.dense = dense;
    for (int state : far) options.far.push_back(static_cast<State>(state));
    options.ring = ring;
    options.sets = sets;
    options.charged = charged;
    options.centred = centred;
    options.where = where_of(device);
    return std::make_unique<Store>(std::move(shapes), std::move(options));
}

store::RowPlan row_plan(Address state, Address tier, Address group, Address set) {
    return {reinterpret_cast<const uint8_t*>(state), reinterpret_cast<const uint8_t*>(tier),
            reinterpret_cast<const int32_t*>(group), reinterpret_cast<const pages::SetTag*>(set)};
}

// One native call per layer and decode step: append, then attend over all that is stored.
void append_attend(Store& s, int layer, const Strides& q, const Strides& k, const Strides& v, const Strides& out,
                   const Strides& lse, Address sinks, int out_dtype, float scale, float softcap, int threads) {
    const py::gil_scoped_release release;
    s.set_threads(threads);
    s.append(layer, tensor(k), tensor(v), 0, s.longest());
    s.attend(layer, call(q, out, lse, sinks, out_dtype, scale, softcap, threads));
}

void attend_beside(Store& s, int layer, SeqId seq, const std::vector<int32_t>& positions, const Strides& q,
                   const Strides& out, const Strides& lse, int out_dtype, float scale, float softcap, int threads) {
    const py::gil_scoped_release release;
    s.set_threads(threads);
    s.attend_beside(layer, seq, positions, call(q, out, lse, 0, out_dtype, scale, softcap, threads));
}

py::dict pool_state(const Store& s, int pool) {
    const auto info = s.pool_info(pool);
    const pages::Pool& p = s.pool(pool);
    py::dict d;
    d["format"] = static_cast<int>(info.format);
    d["head_dim"] = info.head_dim;
    d["page_bytes"] = info.page_bytes;
    d["total"] = p.total();
    d["free"] = p.free();
    d["used"] = p.used();
    d["far"] = info.tier == Tier::far;
    return d;
}

// (index, pages, free pages) of every lent slab.
std::vector<std::tuple<int, int, int>> slabs(const Store& s, int pool) {
    std::vector<std::tuple<int, int, int>> out;
    const auto& all = s.pool(pool).slabs();
    for (size_t i = 0; i < all.size(); ++i) {
        if (all[i].n_pages) out.emplace_back(static_cast<int>(i), all[i].n_pages, all[i].n_free);
    }
    return out;
}

using SpanTuple = std::tuple<Strides, int, Address, int, std::vector<int32_t>>;  // as store::SpanQueries

void score_max(Store& s, int layer, const std::vector<SeqId>& seqs, const SpanTuple& spans, float scale, float softcap,
               Address out, int64_t columns, int threads) {
    const auto& [strides, dtype, lse, count, offsets] = spans;
    const auto [q, row, head, token] = strides;
    const py::gil_scoped_release release;
    s.set_threads(threads);
    s.score_max(layer, seqs,
                {reinterpret_cast<const void*>(q), row, head, token, static_cast<DType>(dtype),
                 reinterpret_cast<const float*>(lse), count, offsets},
                {scale, softcap}, reinterpret_cast<float*>(out), columns);
}

// (pages, alive, hidden, sealed entries) of one row, for tests and debugging.
py::tuple row(const Store& s, SeqId seq, int layer, int head) {
    const pages::Row& r = s.row(seq, layer, head);
    std::vector<uint16_t> hidden;
    for (int e = 0; e < r.entries(); ++e) hidden.push_back(r.hidden(e));
    return py::make_tuple(r.page, r.alive, hidden, r.sealed);
}

}  // namespace

void bind_store(py::module_& m) {
    py::class_<Store> store(m, "Store");
    store
        .def(py::init(&create), py::arg("layers"), py::arg("dtype"), py::arg("tail"), py::arg("hold"), py::arg("sinks"),
             py::arg("formats") = std::vector<int>{}, py::arg("queries") = 0, py::arg("scored") = false,
             py::arg("massed") = false,
             py::arg("recall") = RecallTuple{0, 0, 1.0f, 0, 0, 0, 0.0f, 0, 0.0f, 0, 0, 1 << 30, 0.25, 1},
             py::arg("dense") = std::vector<int>{}, py::arg("far") = std::vector<int>{}, py::arg("ring") = 0,
             py::arg("sets") = false, py::arg("device") = 0, py::arg("charged") = false, py::arg("centred") = true)
        .def_property_readonly("n_pools", &Store::n_pools)
        .def("pool", &pool_state)
        .def(
            "pool_of",
            [](const Store& s, int layer, int state, int tier) {
                return s.pool_of(layer, static_cast<State>(state), static_cast<Tier>(tier));
            },
            py::arg("layer"), py::arg("state") = static_cast<int>(State::full), py::arg("tier") = 0)
        .def("slabs", &slabs)
        .def(
            "lend",
            [](Store& s, int pool, Address payload, Address positions, int n, Address on_device) {
                return s.lend(pool, reinterpret_cast<unsigned char*>(payload), reinterpret_cast<int32_t*>(positions), n,
                              reinterpret_cast<int32_t*>(on_device));
            },
            py::arg("pool"), py::arg("payload"), py::arg("positions"), py::arg("n_pages"), py::arg("on_device") = 0)
        .def("set_lend",
             [](Store& s, const std::function<Address(int, int64_t)>& lend) {
                 s.set_lend([lend](store::Loan loan, int64_t bytes) {
                     const py::gil_scoped_acquire acquire;
                     return reinterpret_cast<unsigned char*>(lend(static_cast<int>(loan), bytes));
                 });
             })
        .def("set_stream", [](Store& s, Address stream) { s.set_stream(reinterpret_cast<void*>(stream)); })
        .def("lend_far", [](Store& s, int pool, int file, int64_t offset, Address positions,
                            int n) { return s.lend_far(pool, file, offset, reinterpret_cast<int32_t*>(positions), n); })
        .def("ring_pages", &Store::ring_pages)
        .def("hold_ring", &Store::hold_ring)
        .def("shrink_ring", &Store::shrink_ring)
        .def("shrink_near", &Store::shrink_near)
        .def("set_recall", [](Store& s, const RecallTuple& r) { s.set_recall(recall(r)); })
        .def("set_choose", [](Store& s, const py::object& choose) { s.set_choose(choose_by(choose)); })
        .def("set_mass_floor", &Store::set_mass_floor)
        .def("audited",
             [](const Store& s) {
                 const store::Audited& a = s.audited();
                 return py::make_tuple(a.estimated, a.exact, a.count);
             })
        .def("captured",
             [](const Store& s) {
                 const store::Captured& c = s.captured();
                 return py::make_tuple(c.sum, c.least, c.count, c.below);
             })
        .def("fetched", &Store::fetched)
        .def("set_ahead",
             [](Store& s, bool on, int64_t limit_ms) { s.set_ahead(on, std::chrono::milliseconds(limit_ms)); })
        .def("late", [](const Store& s) { return py::make_tuple(s.late().pages, s.late().seconds, s.late().hinted); })
        .def("waiting",
             [](Store& s, int layer, const std::vector<SeqId>& seqs) {
                 const store::Waiting w = s.waiting(layer, seqs);
                 return py::make_tuple(w.tokens, w.fresh);
             })
        .def("cluster",
             [](Store& s, int layer, const std::vector<SeqId>& seqs, Address segment, Address group, int64_t columns,
                int iters, int threads) {
                 const py::gil_scoped_release release;
                 s.set_threads(threads);
                 s.cluster(layer, seqs, reinterpret_cast<const int32_t*>(segment), reinterpret_cast<int32_t*>(group),
                           columns, iters);
             })
        .def("give_back", &Store::give_back)
        .def("empty_out", &Store::empty_out, NoGil())
        .def_property_readonly("metadata_bytes", &Store::metadata_bytes)
        .def_property_readonly("workspace_bytes", &Store::workspace_bytes)
        .def("create", &Store::create)
        .def("free", [](Store& s, const std::vector<SeqId>& seqs) { s.free(seqs); })
        .def("fork", &Store::fork)
        .def("select", [](Store& s, const std::vector<SeqId>& seqs,
                          const std::vector<int64_t>& index) { return s.select(seqs, index); })
        .def("crop", &Store::crop)
        .def("confirm", &Store::confirm)
        .def("refit", &Store::refit)
        .def("set_recording", &Store::set_recording)
        .def("length", [](const Store& s, SeqId seq) { return s.sequence(seq).length; })
        .def("floor", [](const Store& s, SeqId seq) { return s.sequence(seq).floor; })
        .def("most_stored",
             [](const Store& s, const std::vector<SeqId>& seqs, const std::vector<int>& heads) {
                 std::vector<std::vector<int>> most;
                 int64_t all = 0;
                 for (size_t layer = 0; layer < heads.size(); ++layer) {
                     std::vector<int>& of = most.emplace_back(heads[layer], 0);
                     for (SeqId seq : seqs) {
                         for (int h = 0; h < heads[layer]; ++h) {
                             const int stored = s.row(seq, static_cast<int>(layer), h).stored;
                             of[h] = std::max(of[h], stored);
                             all += stored;
                         }
                     }
                 }
                 return py::make_tuple(most, all);
             })
        .def("stored", [](const Store& s, SeqId seq, int layer, int head) { return s.row(seq, layer, head).stored; })
        .def("clear", &Store::clear)
        .def("columns", [](Store& s, int layer, const std::vector<SeqId>& seqs) { return s.columns(layer, seqs); })
        .def("look",
             [](Store& s, int layer, const std::vector<SeqId>& seqs, Address positions, Address open, Address state,
                Address scores, Address tier, Address grouped, Address entry, int64_t columns) {
                 s.look(layer, seqs,
                        {reinterpret_cast<int32_t*>(positions), reinterpret_cast<uint8_t*>(open),
                         reinterpret_cast<uint8_t*>(state), reinterpret_cast<float*>(scores),
                         reinterpret_cast<uint8_t*>(tier), reinterpret_cast<uint8_t*>(grouped),
                         reinterpret_cast<int32_t*>(entry)},
                        columns);
             })
        .def("tally",
             [](Store& s, int layer, const std::vector<SeqId>& seqs) {
                 const store::Tally found = s.tally(layer, seqs);
                 return py::make_tuple(std::vector<int64_t>(found.slots, found.slots + store::kStates), found.entries,
                                       found.far);
             })
        .def("set_scores",
             [](Store& s, int layer, const std::vector<SeqId>& seqs, Address scores, int64_t columns) {
                 s.set_scores(layer, seqs, reinterpret_cast<const float*>(scores), columns);
             })
        .def("queries", [](Store& s, int layer, SeqId seq,
                           Address out) { return s.queries(layer, seq, reinterpret_cast<void*>(out)); })
        .def("row", &row)
        .def("positions", [](Store& s, SeqId seq, int layer, int head,
                             Address out) { s.positions(seq, layer, head, reinterpret_cast<int32_t*>(out)); })
        .def("read",
             [](Store& s, SeqId seq, int layer, int head, Address k, Address v) {
                 s.read(seq, layer, head, reinterpret_cast<float*>(k), reinterpret_cast<float*>(v));
             })
        .def("begin", [](Store& s, const std::vector<SeqId>& seqs, const std::vector<int32_t>& starts,
                         const std::vector<int32_t>& tokens) { s.begin(seqs, starts, tokens); })
        .def("needed", &Store::needed)
        .def("missing", &Store::missing)
        .def("needed_each", &Store::needed_each)
        .def("owner", [](const Store& s, SeqId seq) { return s.sequence(seq).owner; })
        .def("charges",
             [](const Store& s) {
                 std::vector<std::tuple<pages::Owner, int, int64_t>> out;
                 for (const store::Charge& c : s.charges()) out.emplace_back(c.owner, c.pool, c.pages);
                 return out;
             })
        .def("holdings",
             [](Store& s, SeqId seq) {
                 std::vector<std::tuple<int, uint32_t, int64_t>> out;
                 for (const store::Holding& h : s.holdings(seq)) out.emplace_back(h.pool, h.holders, h.pages);
                 return out;
             })
        .def_property_readonly("longest", &Store::longest)
        .def("append",
             [](Store& s, int layer, const Strides& k, const Strides& v, int from, int to, int threads) {
                 const py::gil_scoped_release release;
                 s.set_threads(threads);
                 s.append(layer, tensor(k), tensor(v), from, to);
             })
        .def("attend",
             [](Store& s, int layer, const Strides& q, const Strides& out, const Strides& lse, Address sinks,
                int out_dtype, float scale, float softcap, int threads) {
                 const py::gil_scoped_release release;
                 s.attend(layer, call(q, out, lse, sinks, out_dtype, scale, softcap, threads));
             })
        .def("append_attend", &append_attend)
        .def("stage_queries", [](Store& s, int layer, const Strides& q) { s.stage_queries(layer, tensor(q)); })
        .def("add_mass",
             [](Store& s, int layer, const Strides& q, int from, int to, float scale, float softcap, int threads) {
                 const py::gil_scoped_release release;
                 s.set_threads(threads);
                 s.add_mass(layer, tensor(q), from, to, scale, softcap);
             })
        .def("settle", py::overload_cast<int>(&Store::settle), NoGil())
        .def("commit", &Store::commit, NoGil())
        .def("rollback", &Store::rollback, NoGil())
        .def_property_readonly("in_step", &Store::in_step)
        .def("score_window",
             [](Store& s, int layer, const std::vector<SeqId>& seqs, int queries, int spread, float weight, float scale,
                float softcap, Address out, int64_t columns) {
                 s.score_window(layer, seqs, queries, static_cast<ops::Spread>(spread), weight, {scale, softcap},
                                reinterpret_cast<float*>(out), columns);
             })
        .def("score_max", &score_max)
        .def("measure",
             [](Store& s, int layer, const std::vector<SeqId>& seqs, int queries, int which, float scale, float softcap,
                Address out) {
                 s.measure(layer, seqs, queries, static_cast<ops::Stats>(which), {scale, softcap},
                           reinterpret_cast<float*>(out));
             })
        .def("score_pages",
             [](Store& s, int layer, const std::vector<SeqId>& seqs, int queries, float scale, float softcap,
                Address out, int64_t columns) {
                 s.score_pages(layer, seqs, queries, {scale, softcap}, reinterpret_cast<float*>(out), columns);
             })
        .def("score_keys",
             [](Store& s, int layer, const std::vector<SeqId>& seqs, int kind, Address out, int64_t columns) {
                 s.score_keys(layer, seqs, static_cast<ops::KeyScore>(kind), reinterpret_cast<float*>(out), columns);
             })
        .def("pool_scores",
             [](Store& s, int layer, const std::vector<SeqId>& seqs, Address score, int group, int64_t columns,
                int kernel, int kind, int divide, Address out) {
                 s.pool_scores(layer, seqs, reinterpret_cast<const float*>(score), group, columns, kernel,
                               static_cast<ops::PoolKind>(kind), static_cast<ops::PoolDivide>(divide),
                               reinterpret_cast<float*>(out));
             })
        .def(
            "check_plan",
            [](Store& s, int layer, const std::vector<SeqId>& seqs, Address state, Address tier, Address group,
               int64_t columns, bool protect, Address set) {
                const store::RowPlan p = row_plan(state, tier, group, set);
                s.check_plan(layer, seqs, {p.state, p.tier, p.group, columns, p.set}, protect);
            },
            py::arg("layer"), py::arg("seqs"), py::arg("state"), py::arg("tier"), py::arg("group"), py::arg("columns"),
            py::arg("protect"), py::arg("set") = 0)
        .def(
            "plan_piece",
            [](Store& s, int layer, SeqId seq, int head, Address state, Address tier, Address group,
               const std::vector<int64_t>& cost, int64_t spare, Address set, int64_t room) {
                const auto piece = s.plan_piece(layer, seq, head, row_plan(state, tier, group, set), cost, spare, room);
                return py::make_tuple(piece.entries, piece.changing, piece.pages);
            },
            py::arg("layer"), py::arg("seq"), py::arg("head"), py::arg("state"), py::arg("tier"), py::arg("group"),
            py::arg("cost"), py::arg("spare"), py::arg("set") = 0, py::arg("room") = INT64_MAX)
        .def(
            "apply_plan",
            [](Store& s, int layer, SeqId seq, int head, Address state, Address tier, Address group, int most,
               Address set) {
                return s.apply_plan(layer, seq, head, row_plan(state, tier, group, set),
                                    reinterpret_cast<uint8_t*>(state), reinterpret_cast<pages::SetTag*>(set), most);
            },
            py::arg("layer"), py::arg("seq"), py::arg("head"), py::arg("state"), py::arg("tier"), py::arg("group"),
            py::arg("most"), py::arg("set") = 0)
        .def("seen", [](const Store& s, int layer, SeqId seq) { return s.seen(layer, s.sequence(seq)); })
        .def("attend_beside", &attend_beside);
    bind_sets(m, store);
}

}  // namespace kvstrata::bind
