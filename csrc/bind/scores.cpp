// The ops that rank tokens: score_window, score_max, measure, pool, accumulate, score_keys.
#include <optional>

#include "bind/bind.h"
#include "bind/tensors.h"
#include "common/check.h"
#include "ops/accumulate.h"
#include "ops/measure.h"
#include "ops/pool.h"
#include "ops/score_keys.h"
#include "ops/score_max.h"
#include "ops/score_window.h"

namespace kvstrata::bind {
namespace {

constexpr std::initializer_list<DType> kFloats = {DType::f32, DType::bf16, DType::f16};

int32_t int_of(int64_t n) { return static_cast<int32_t>(n); }

// A list of pages per row with its masks.
struct PageLists {
    const Call call;
    Argument pages, visible;

    PageLists(const Call& call_, py::handle pages_, py::handle visible_)
        : call(call_), pages(call, "pages", pages_), visible(call, "visible", visible_) {
        pages.expect_rank({"R", "K"});
        pages.expect({DType::i32}, {rows(), entries()});
        visible.expect({DType::u16}, {rows(), entries()}, "set by pages");
    }
    Dim rows() const { return {"R", pages.shape(0)}; }
    Dim entries() const { return {"K", pages.shape(1)}; }

    // head_dim 0: any, as long as all pages that are read agree; where ids cannot be read, all pools. Returns it.
    int check_ids(const Pools& pools, int head_dim) const {
        if (!call.on_host()) {
            if (!head_dim) head_dim = pools.head_dim();
            pools.expect_head_dim(head_dim);
            return head_dim;
        }
        for (int64_t r = 0; r < rows().size; ++r) {
            const PageId* ids = pages.row<PageId>(r);
            const uint16_t* masks = visible.row<uint16_t>(r);
            for (int64_t e = 0; e < entries().size; ++e) {  // what is not read may hold anything
                if (ids[e] == kNoPage || (masks && !masks[e])) continue;
                if (!head_dim) head_dim = pools.head_dim(ids[e]);
                pools.check_id(ids[e], head_dim, {"pages", r, e});
            }
        }
        return head_dim;
    }
};

// The tensors that score_window and measure share, as a dict: both have many.
struct WindowArguments {
    const Call op;
    Argument q;
    PageLists lists;
    Argument queries;  // read here, wherever the op runs
    Argument q_pos, centre, sinks, workspace;

    WindowArguments(const char* op_, const py::dict& d)
        : op(op_, d["q"]),
          q(op, "q", d["q"]),
          lists(op, d["pages"], d["visible"]),
          queries(op_, "queries", d["queries"]),
          q_pos(op, "q_pos", d["q_pos"]),
          centre(op, "centre", d["centre"]),
          sinks(op, "sinks", d["sinks"]),
          workspace(op, "workspace", d["workspace"]) {
        q.expect_rank({"R", "W", "G", "D"});
        const Dim R = lists.rows(), W{"W", q.shape(1)}, G = group(), D{"D", q.shape(3)};
        q.expect(kFloats, {R, W, G, D}, "R set by pages");
        queries.expect({DType::i32}, {R}, "set by pages").expect_contiguous();
        q_pos.expect({DType::i32}, {R, W}, "set by q");
        centre.expect({DType::f32}, {R, D}, "set by q");
        sinks.expect({DType::f32}, {R, G}, "set by q");
        for (int64_t r = 0; queries.given() && r < R.size; ++r) {
            const int32_t count = queries.data<int32_t>()[r];
            check(count >= 0 && count <= W.size, op, ": queries[", r, "] is ", count, ", expected 0 to ", W.size,
                  " (W)");
        }
    }
    Dim group() const { return {"G", q.shape(2)}; }

    std::vector<ops::WindowRow> rows() const {
        std::vector<ops::WindowRow> rows(static_cast<size_t>(q.shape(0)));
        for (int64_t r = 0; r < q.shape(0); ++r) {
            rows[r] = {q.row<void>(r),
                       q.stride(1),
                       q.stride(2),
                       nullptr,
                       q_pos.row<int32_t>(r),
                       lists.pages.row<PageId>(r),
                       lists.visible.row<uint16_t>(r),
                       centre.row<float>(r),
                       sinks.row<float>(r),
                       int_of(lists.pages.shape(1)),
                       queries.given() ? queries.data<int32_t>()[r] : int_of(q.shape(1))};
        }
        return rows;
    }

    void check_pools(const Pools& pools) const {
        lists.check_ids(pools, static_cast<int>(q.shape(3)));
        if (q_pos.given()) pools.check_positions("q_pos is given");
    }

    template <class Params>
    void fill(Params& p, const std::vector<ops::WindowRow>& rows, const Pools& pools, float scale, float softcap,
              int window, int threads) const {
        p.rows = rows.data();
        p.n_rows = int_of(q.shape(0)), p.group = int_of(q.shape(2)), p.head_dim = int_of(q.shape(3));
        p.q_dtype = q.dtype();
        p.pools = pools.views();
        p.scale = scale, p.softcap = softcap;
        p.window = window, p.threads = threads;
    }
};

// By capacity: so many rows, each of up to so many queries and entries. On CUDA also by the type of q and by what pages there
// are, if pools are given: else of every format.
template <class Params>
int64_t window_workspace_bytes(const char* op, int64_t (*bytes)(const Params&, const Where&), int rows, int queries,
                               int group, int head_dim, int entries, int threads, int device, int dtype,
                               const py::object& pools_) {
    ops::WindowRow row{};
    row.entries = entries, row.queries = queries;
    const std::vector<ops::WindowRow> all(static_cast<size_t>(rows), row);
    Call call(op);
    call.where = where_of(device);
    std::optional<Pools> pools;
    if (!pools_.is_none()) pools.emplace(call, pools_, true);
    Params p{};
    p.rows = all.data();
    p.n_rows = rows, p.group = group, p.head_dim = head_dim, p.threads = threads;
    p.q_dtype = static_cast<DType>(dtype);
    p.pools = pools ? pools->views() : nullptr;
    return bytes(p, call.where);
}

void score_window(py::dict tensors, const py::sequence& pools_, float scale, float softcap, int window, int spread,
                  float weight, int threads) {
    const WindowArguments a("score_window", tensors);
    const Argument score(a.op, "score", tensors["score"]), lse(a.op, "lse", tensors["lse"]);
    const Dim R = a.lists.rows(), G = a.group();
    score.expect({DType::f32}, {R, G, a.lists.entries(), {"16", kSlots}}, "set by q and pages");
    lse.expect({DType::f32}, {R, G, {"W", a.q.shape(1)}}, "set by q");
    check(score.stride(2) == kSlots || score.shape(2) <= 1, "score_window: score has stride ", score.stride(2),
          " in dimension 2, expected ", kSlots);
    const Pools pools(a.op, pools_, true);
    a.check_pools(pools);
    const std::vector<ops::WindowRow> rows = a.rows();
    ops::ScoreWindowParams p{};
    a.fill(p, rows, pools, scale, softcap, window, threads);
    p.spread = static_cast<ops::Spread>(spread), p.weight = weight;
    p.score = score.data<float>();
    p.score_stride_r = score.stride(0), p.score_stride_g = score.stride(1);
    p.lse = lse.data<float>();
    p.lse_stride_r = lse.stride(0), p.lse_stride_g = lse.stride(1);
    p.workspace = workspace_of(a.op, a.workspace, ops::score_window_workspace_bytes(p, a.op.where));
    py::gil_scoped_release release;
    ops::score_window(p, a.op.where);
}

void measure(py::dict tensors, const py::sequence& pools_, float scale, float softcap, int window, int which, int skip,
             int threads) {
    const WindowArguments a("measure", tensors);
    const Argument stats(a.op, "out", tensors["out"]);
    stats.expect({DType::f32}, {a.lists.rows(), a.group(), {"3", 3}}, "set by q").expect_contiguous();
    const Pools pools(a.op, pools_, true);
    a.check_pools(pools);
    const std::vector<ops::WindowRow> rows = a.rows();
    ops::MeasureParams p{};
    a.fill(p, rows, pools, scale, softcap, window, threads);
    p.which = static_cast<ops::Stats>(which), p.skip = skip;
    p.stats = stats.data<float>();
    p.workspace = workspace_of(a.op, a.workspace, ops::measure_workspace_bytes(p, a.op.where));
    py::gil_scoped_release release;
    ops::measure(p, a.op.where);
}

// The numbers of rows, heads and queries count on CUDA alone.
int64_t score_max_workspace_bytes(int head_dim, int threads, int rows, int group, int queries, int device) {
    ops::ScoreMaxParams p{};
    p.head_dim = head_dim, p.threads = threads;
    p.n_rows = rows, p.group = group, p.queries = queries;
    return ops::score_max_workspace_bytes(p, where_of(device));
}

void score_max(py::dict tensors, const py::sequence& pools_, float scale, float softcap, int threads) {
    const Call op("score_max", tensors["q"]);
    const Argument q(op, "q", tensors["q"]), lse(op, "lse", tensors["lse"]), spans(op, "spans", tensors["spans"]);
    const Argument centre(op, "centre", tensors["centre"]), out(op, "out", tensors["out"]);
    const Argument space(op, "workspace", tensors["workspace"]);
    const PageLists lists(op, tensors["pages"], tensors["visible"]);
    q.expect_rank({"R", "G", "W", "D"});
    spans.expect_rank({"E + 1"});
    const Dim R = lists.rows(), G{"G", q.shape(1)}, W{"W", q.shape(2)}, D{"D", q.shape(3)};
    const Dim E{"E", spans.shape(0) - 1};
    q.expect(kFloats, {R, G, W, D}, "R set by pages");
    lse.expect({DType::f32}, {R, G, W}, "set by q");
    spans.expect({DType::i32}, {{"E + 1", spans.shape(0)}}).expect_contiguous();
    centre.expect({DType::f32}, {R, D}, "set by q");
    check(E.size >= 1, op, ": spans has ", spans.shape(0), " offsets, expected at least 2");
    out.expect({DType::f32}, {E, R, lists.entries(), {"16", kSlots}}, "set by spans and pages");
    check(out.stride(2) == kSlots || out.shape(2) <= 1, "score_max: out has stride ", out.stride(2),
          " in dimension 2, expected ", kSlots);
    const Pools pools(op, pools_, true);
    lists.check_ids(pools, int_of(D.size));
    std::vector<ops::WindowRow> rows(static_cast<size_t>(R.size));
    for (int64_t r = 0; r < R.size; ++r) {
        ops::WindowRow& row = rows[r];
        row.q = q.row<void>(r), row.q_stride_t = q.stride(2), row.q_stride_g = q.stride(1);
        row.pages = lists.pages.row<PageId>(r), row.visible = lists.visible.row<uint16_t>(r);
        row.centre = centre.row<float>(r), row.entries = int_of(lists.entries().size);
    }
    ops::ScoreMaxParams p{};
    p.rows = rows.data();
    p.n_rows = int_of(R.size), p.group = int_of(G.size), p.head_dim = int_of(D.size);
    p.q_dtype = q.dtype();
    p.pools = pools.views();
    p.scale = scale, p.softcap = softcap, p.threads = threads;
    p.spans = spans.data<int32_t>();
    p.n_spans = int_of(E.size), p.queries = int_of(W.size);
    p.lse = lse.data<float>();
    p.lse_stride_r = lse.stride(0), p.lse_stride_g = lse.stride(1);
    p.out = out.data<float>();
    p.out_stride_e = out.stride(0), p.out_stride_r = out.stride(1);
    p.workspace = workspace_of(op, space, ops::score_max_workspace_bytes(p, op.where));
    py::gil_scoped_release release;
    ops::score_max(p, op.where);
}

int64_t pool_workspace_bytes(int rows, int entries, int threads, int device) {
    ops::PoolRow row{};
    row.entries = entries;
    const std::vector<ops::PoolRow> all(static_cast<size_t>(rows), row);
    ops::PoolParams p{};
    p.rows = all.data();
    p.n_rows = rows, p.threads = threads;
    return ops::pool_workspace_bytes(p, where_of(device));
}

void pool(py::handle score_, py::handle pages_, py::handle visible_, py::handle out_, py::handle workspace_,
          const py::sequence& pools_, int kernel, int kind, int divide, int threads) {
    const Call op("pool", score_);
    const Argument score(op, "score", score_), out(op, "out", out_), space(op, "workspace", workspace_);
    const PageLists lists(op, pages_, visible_);
    score.expect_rank({"R", "G", "K", "16"});
    const Dim S{"16", kSlots}, G{"G", score.shape(1)};
    score.expect({DType::f32}, {lists.rows(), G, lists.entries(), S}, "set by pages").expect_contiguous();
    out.expect({DType::f32}, {lists.rows(), lists.entries(), S}, "set by pages").expect_contiguous();
    const Pools pools(op, pools_, true);
    lists.check_ids(pools, 0);
    pools.check_positions("pool reads them");
    std::vector<ops::PoolRow> rows(static_cast<size_t>(lists.rows().size));
    for (int64_t r = 0; r < lists.rows().size; ++r) {
        rows[r] = {score.row<float>(r),        score.stride(1),
                   lists.pages.row<PageId>(r), lists.visible.row<uint16_t>(r),
                   out.row<float>(r),          int_of(lists.entries().size)};
    }
    ops::PoolParams p{};
    p.rows = rows.data();
    p.n_rows = int_of(lists.rows().size), p.group = int_of(G.size), p.kernel = kernel;
    p.kind = static_cast<ops::PoolKind>(kind), p.divide = static_cast<ops::PoolDivide>(divide);
    p.pools = pools.views();
    p.threads = threads;
    p.workspace = workspace_of(op, space, ops::pool_workspace_bytes(p, op.where));
    py::gil_scoped_release release;
    ops::pool(p, op.where);
}

void accumulate(py::handle score_, py::handle mass_, float decay, int combine, int threads) {
    const Call call("accumulate", score_);
    const Argument score(call, "score", score_), mass(call, "mass", mass_);
    score.expect_rank({"n"});
    const Dim n{"n", score.shape(0)};
    score.expect({DType::f32}, {n}).expect_contiguous();
    mass.expect({DType::f32}, {n}, "as score").expect_contiguous();
    const ops::AccumulateParams p{
        score.data<float>(), mass.data<float>(), n.size, decay, static_cast<ops::Combine>(combine), threads};
    py::gil_scoped_release release;
    ops::accumulate(p, call.where);
}

int64_t score_keys_workspace_bytes(int rows, int head_dim, int entries, int kind, int threads, int device) {
    ops::KeysRow row{};
    row.entries = entries;
    const std::vector<ops::KeysRow> all(static_cast<size_t>(rows), row);
    return ops::score_keys_workspace_bytes(
        {all.data(), rows, head_dim, static_cast<ops::KeyScore>(kind), nullptr, nullptr, threads}, where_of(device));
}

void score_keys(py::handle pages_, py::handle visible_, py::handle centre_, py::handle out_, py::handle workspace_,
                const py::sequence& pools_, int head_dim, int kind, int threads) {
    const Call op("score_keys", pages_);
    const PageLists lists(op, pages_, visible_);
    const Argument centre(op, "centre", centre_), out(op, "out", out_), space(op, "workspace", workspace_);
    const Dim R = lists.rows(), K = lists.entries();
    out.expect({DType::f32}, {R, K, {"16", kSlots}}, "set by pages").expect_contiguous();
    centre.expect({DType::f32}, {R, {"D", head_dim}}, "set by pools");
    const Pools pools(op, pools_, true);
    lists.check_ids(pools, head_dim);
    std::vector<ops::KeysRow> rows(static_cast<size_t>(R.size));
    for (int64_t r = 0; r < R.size; ++r) {
        rows[r] = {lists.pages.row<PageId>(r), lists.visible.row<uint16_t>(r), centre.row<float>(r), out.row<float>(r),
                   int_of(K.size)};
    }
    ops::ScoreKeysParams p{rows.data(),   int_of(R.size), head_dim, static_cast<ops::KeyScore>(kind),
                           pools.views(), nullptr,        threads};
    p.workspace = workspace_of(op, space, ops::score_keys_workspace_bytes(p, op.where));
    py::gil_scoped_release release;
    ops::score_keys(p, op.where);
}

}  // namespace

void bind_scores(py::module_& m) {
    const auto window_bytes = [&m](const char* name, const char* op, auto bytes) {
        m.def(
            name,
            [op, bytes](int rows, int queries, int group, int head_dim, int entries, int threads, int device, int dtype,
                        const py::object& pools) {
                return window_workspace_bytes(op, bytes, rows, queries, group, head_dim, entries, threads, device,
                                              dtype, pools);
            },
            py::arg("rows"), py::arg("queries"), py::arg("group"), py::arg("head_dim"), py::arg("entries"),
            py::arg("threads"), py::arg("device"), py::arg("dtype"), py::arg("pools"));
    };
    window_bytes("score_window_workspace_bytes", "score_window", &ops::score_window_workspace_bytes);
    window_bytes("measure_workspace_bytes", "measure", &ops::measure_workspace_bytes);
    m.def("score_window", &score_window, py::arg("tensors"), py::arg("pools"), py::arg("scale"), py::arg("softcap"),
          py::arg("window"), py::arg("spread"), py::arg("weight"), py::arg("threads"));
    m.def("measure", &measure, py::arg("tensors"), py::arg("pools"), py::arg("scale"), py::arg("softcap"),
          py::arg("window"), py::arg("which"), py::arg("skip"), py::arg("threads"));
    m.def("score_max_workspace_bytes", &score_max_workspace_bytes, py::arg("head_dim"), py::arg("threads"),
          py::arg("rows") = 0, py::arg("group") = 1, py::arg("queries") = 0, py::arg("device") = 0);
    m.def("score_max", &score_max, py::arg("tensors"), py::arg("pools"), py::arg("scale"), py::arg("softcap"),
          py::arg("threads"));
    m.def("pool_workspace_bytes", &pool_workspace_bytes, py::arg("rows"), py::arg("entries"), py::arg("threads"),
          py::arg("device"));
    m.def("pool", &pool, py::arg("score"), py::arg("pages"), py::arg("visible"), py::arg("out"), py::arg("workspace"),
          py::arg("pools"), py::arg("kernel"), py::arg("kind"), py::arg("divide"), py::arg("threads"));
    m.def("accumulate", &accumulate, py::arg("score"), py::arg("mass"), py::arg("decay"), py::arg("combine"),
          py::arg("threads"));
    m.def("score_keys_workspace_bytes", &score_keys_workspace_bytes, py::arg("rows"), py::arg("head_dim"),
          py::arg("entries"), py::arg("kind"), py::arg("threads"), py::arg("device"));
    m.def("score_keys", &score_keys, py::arg("pages"), py::arg("visible"), py::arg("centre"), py::arg("out"),
          py::arg("workspace"), py::arg("pools"), py::arg("head_dim"), py::arg("kind"), py::arg("threads"));
}

}  // namespace kvstrata::bind
