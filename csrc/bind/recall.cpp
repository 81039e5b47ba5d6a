// The ops of recall: cluster, summarize, select, score_pages, estimate.
#include <algorithm>

#include "bind/bind.h"
#include "bind/tensors.h"
#include "common/check.h"
#include "common/layout.h"
#include "ops/cluster.h"
#include "ops/estimate.h"
#include "ops/score_pages.h"
#include "ops/summarize.h"
#include "ops/summarize_groups.h"

namespace kvstrata::bind {
namespace {

int32_t int_of(int64_t n) { return static_cast<int32_t>(n); }

using ClusterOp = void (*)(const ops::ClusterParams&, const Where&);
using ClusterBytes = int64_t (*)(const ops::ClusterParams&, const Where&);

template <ClusterBytes Bytes>
int64_t cluster_workspace_bytes(int rows, int tokens, int head_dim, int threads, int device) {
    std::vector<ops::ClusterRow> all(static_cast<size_t>(rows), {nullptr, nullptr, nullptr, tokens, 0});
    return Bytes({all.data(), rows, head_dim, 0, nullptr, threads}, where_of(device));
}

void run_cluster(const char* name, ClusterOp run, ClusterBytes bytes, py::handle keys_, py::handle live_,
                 py::handle page_of_, py::handle pages_, py::handle workspace_, int iters, int threads) {
    const Call op(name, keys_);
    const Argument keys(op, "keys", keys_), live(op, "live", live_), page_of(op, "page_of", page_of_),
        pages(op, "pages", pages_), space(op, "workspace", workspace_);
    keys.expect_rank({"R", "T", "D"});
    const Dim R{"R", keys.shape(0)}, T{"T", keys.shape(1)}, D{"D", keys.shape(2)};
    keys.expect({DType::f32}, {R, T, D}).expect_contiguous();
    live.expect({DType::u8}, {R, T}, "set by keys");
    page_of.expect({DType::i32}, {R, T}, "set by keys");
    pages.expect({DType::i32}, {R}, "set by keys").expect_contiguous();
    check(T.size <= ops::kMaxClusterTokens, op, ": keys has T ", T.size, ", expected at most ", ops::kMaxClusterTokens);
    std::vector<ops::ClusterRow> rows(static_cast<size_t>(R.size));
    for (int64_t r = 0; r < R.size; ++r) {
        rows[r] = {keys.row<float>(r),       live.row<uint8_t>(r), page_of.row<int32_t>(r), int_of(T.size), 0,
                   pages.data<int32_t>() + r};
    }
    ops::ClusterParams p{rows.data(), int_of(R.size), int_of(D.size), iters, nullptr, threads};
    p.workspace = workspace_of(op, space, bytes(p, op.where));
    {
        const py::gil_scoped_release release;
        run(p, op.where);
    }
    for (int64_t r = 0; op.on_host() && r < R.size; ++r) pages.data<int32_t>()[r] = rows[r].pages;
}

void cluster(py::handle keys, py::handle live, py::handle page_of, py::handle pages, py::handle workspace, int iters,
             int threads) {
    run_cluster("cluster", ops::cluster, ops::cluster_workspace_bytes, keys, live, page_of, pages, workspace, iters,
                threads);
}

void cluster_greedy(py::handle keys, py::handle live, py::handle page_of, py::handle pages, py::handle workspace,
                    int threads) {
    run_cluster("cluster_greedy", ops::cluster_greedy, ops::cluster_greedy_workspace_bytes, keys, live, page_of, pages,
                workspace, 0, threads);
}

void summarize(py::handle pages_, py::handle visible_, py::handle centre_, py::handle blocks_,
               const py::sequence& pools_, int head_dim, int kind_, int threads) {
    const Call op("summarize", blocks_);
    const Call numbers(op.op);  // ids and masks travel by value, wherever the pages lie
    const auto kind = static_cast<SummaryKind>(kind_);
    const int64_t size = summary_bytes(head_dim, kind);
    const Argument pages(numbers, "pages", pages_), visible(numbers, "visible", visible_),
        centre(op, "centre", centre_), blocks(op, "blocks", blocks_);
    pages.expect_rank({"R", "M"});
    const Dim R{"R", pages.shape(0)}, M{"M", pages.shape(1)}, B{"B", (M.size + kSlots - 1) / kSlots};
    pages.expect({DType::i32}, {R, M});
    visible.expect({DType::u16}, {R, M}, "set by pages");
    centre.expect({DType::f32}, {R, {"D", head_dim}}, "set by pools");
    blocks.expect({DType::u8}, {R, B, {"bytes", size}}, "set by pages").expect_contiguous();
    const Pools pools(op, pools_, true);
    std::vector<ops::SummaryItem> items;
    items.reserve(static_cast<size_t>(R.size * B.size * kSlots));
    for (int64_t r = 0; r < R.size; ++r) {
        const PageId* const ids = pages.row<PageId>(r);
        const uint16_t* const masks = visible.row<uint16_t>(r);
        for (int64_t e = 0; e < B.size * kSlots; ++e) {  // lanes beyond the last entry are written too
            const PageId id = e < M.size ? ids[e] : kNoPage;
            const uint16_t mask = e >= M.size ? uint16_t{0} : masks ? masks[e] : kAllSlots;
            if (id != kNoPage && mask) pools.check_id(id, head_dim, {"pages", r, e});
            unsigned char* const block = blocks.row<unsigned char>(r) + e / kSlots * size;
            items.push_back({id, mask, centre.row<float>(r), block, int_of(e % kSlots)});
        }
    }
    const ops::SummarizeParams p{
        items.data(), int_of(static_cast<int64_t>(items.size())), head_dim, pools.views(), threads, kind};
    const py::gil_scoped_release release;
    ops::summarize(p, op.where);
}

// Of whole groups of the entries alone.
void summarize_groups(py::handle blocks_, py::handle visible_, py::handle groups_, int head_dim, int kind_,
                      int threads) {
    const Call op("summarize_groups", blocks_);
    const int64_t size = summary_bytes(head_dim, static_cast<SummaryKind>(kind_));
    const Argument blocks(op, "blocks", blocks_), visible(op, "visible", visible_), groups(op, "groups", groups_);
    visible.expect_rank({"R", "M"});
    blocks.expect_rank({"R", "B", "bytes"});
    const Dim R{"R", visible.shape(0)}, M{"M", visible.shape(1)};
    const int count = int_of(M.size / ops::kGroupPages), super = (count + kSlots - 1) / kSlots;
    const Dim B{"B", std::max(blocks.shape(1), (M.size + kSlots - 1) / kSlots)};
    visible.expect({DType::u16}, {R, M});
    blocks.expect({DType::u8}, {R, B, {"bytes", size}}, "set by visible, head_dim and kind").expect_contiguous();
    groups.expect({DType::u8}, {R, {"B", super}, {"bytes", summary_bytes(head_dim)}}, "set by visible")
        .expect_contiguous();
    std::vector<ops::GroupItem> items;
    for (int64_t r = 0; r < R.size; ++r) {
        for (int i = 0; i < count; ++i) {
            const unsigned char* const from = blocks.row<unsigned char>(r) + ops::kGroupBlocks * i * size;
            items.push_back({{from, from + size},
                             visible.row<uint16_t>(r) + ops::kGroupPages * i,
                             groups.row<unsigned char>(r) + i / kSlots * summary_bytes(head_dim),
                             i % kSlots});
        }
    }
    const ops::SummarizeGroupsParams p{items.data(), int_of(static_cast<int64_t>(items.size())), head_dim, threads};
    const py::gil_scoped_release release;
    ops::summarize_groups(p, op.where);
}

// What select and score_pages share.
struct SelectArguments {
    Call op;
    SummaryKind kind;
    Argument q, blocks, starts, visible;
    std::vector<const unsigned char*> pointers;  // [R, B]
    std::vector<ops::SelectRow> rows;

    SelectArguments(const char* name, int kind_, py::handle q_, py::handle blocks_, py::handle starts_,
                    py::handle visible_)
        : op(name, q_),
          kind(static_cast<SummaryKind>(kind_)),
          q(op, "q", q_),
          blocks(op, "blocks", blocks_),
          starts(op, "starts", starts_),
          visible(op, "visible", visible_) {
        q.expect_rank({"R", "G", "D"});
        visible.expect_rank({"R", "M"});
        blocks.expect_rank({"R", "B", "bytes"});
        const Dim R{"R", q.shape(0)}, M{"M", visible.shape(1)}, D{"D", q.shape(2)};
        if (!quantizable(int_of(D.size))) {
            throw Unsupported(message(op, ": head_dim is ", D.size, ", expected a multiple of 16 in ", kMinQuantizedDim,
                                      " to ", kMaxHeadDim));
        }
        const Dim B{"B", std::max(blocks.shape(1), (M.size + kSlots - 1) / kSlots)};
        q.expect({DType::f32, DType::bf16, DType::f16}, {R, {"G", q.shape(1)}, D});
        visible.expect({DType::u16}, {R, M}, "set by q");
        const int64_t size = summary_bytes(int_of(D.size), kind);
        blocks.expect({DType::u8}, {R, B, {"bytes", size}}, "set by visible, q and kind").expect_contiguous();
        starts.expect({DType::i64}, {R, B}, "where blocks begin").expect_contiguous();
        check(starts.given() != op.on_host(), op, ": starts is ", starts.given() ? "given" : "missing",
              ", expected where blocks begin on a device alone");
        pointers.resize(op.on_host() ? static_cast<size_t>(R.size * B.size) : 0);
        rows.resize(static_cast<size_t>(R.size));
        for (int64_t r = 0; r < R.size; ++r) {
            for (int64_t b = 0; op.on_host() && b < B.size; ++b) {
                pointers[r * B.size + b] = blocks.row<unsigned char>(r) + b * size;
            }
            rows[r].q = q.row<void>(r), rows[r].q_stride_g = q.stride(1);
            rows[r].blocks = op.on_host() ? pointers.data() + r * B.size
                                          : reinterpret_cast<const unsigned char* const*>(starts.row<int64_t>(r));
            rows[r].visible = visible.row<uint16_t>(r), rows[r].entries = int_of(M.size);
        }
    }

    ops::SelectParams params(float scale, float weight, float softcap, ops::Aggregate aggregate, int threads) {
        return {rows.data(),
                int_of(q.shape(0)),
                int_of(q.shape(1)),
                int_of(q.shape(2)),
                q.dtype(),
                scale,
                weight,
                aggregate,
                nullptr,
                threads,
                kind,
                softcap};
    }
};

// Of rows of so many entries, which `size` of a row says.
template <class Params, class Row, int32_t Row::* size, int64_t (*bytes)(const Params&, const Where&)>
int64_t scan_workspace_bytes(int rows, int group, int head_dim, int entries, int threads, int device) {
    Row row{};
    row.*size = entries;
    std::vector<Row> all(static_cast<size_t>(rows), row);
    Params p{};
    p.rows = all.data(), p.n_rows = rows, p.group = group, p.head_dim = head_dim, p.threads = threads;
    return bytes(p, where_of(device));
}

void score_pages(py::handle q, py::handle blocks, py::handle starts, py::handle visible, py::handle x_,
                 py::handle found_, py::handle workspace_, float scale, float weight, float softcap, int kind,
                 int threads) {
    SelectArguments a("score_pages", kind, q, blocks, starts, visible);
    const Argument x(a.op, "x", x_), found(a.op, "found", found_), space(a.op, "workspace", workspace_);
    const Dim R{"R", a.q.shape(0)};
    x.expect({DType::f32}, {R, {"G", a.q.shape(1)}, {"M", a.visible.shape(1)}}, "set by q and visible")
        .expect_contiguous();
    found.expect({DType::i32}, {R, {"3", 3}}, "set by q").expect_contiguous();
    for (int64_t r = 0; r < R.size; ++r) a.rows[r].x = x.row<float>(r), a.rows[r].found = found.row<int32_t>(r);
    ops::SelectParams p = a.params(scale, weight, softcap, ops::Aggregate::sum, threads);
    p.workspace = workspace_of(a.op, space, ops::select_workspace_bytes(p, a.op.where));
    const py::gil_scoped_release release;
    ops::score_pages(p, a.op.where);
}

void select(py::handle q, py::handle blocks, py::handle starts, py::handle visible, py::handle k_, py::handle lse_base_,
            py::handle entries_, py::handle found_, py::handle lse_rest_, py::handle zone_, py::handle groups_,
            py::handle workspace_, float scale, float weight, float softcap, int kind, int aggregate, float mass,
            int least, int expand, int threads) {
    SelectArguments a("select", kind, q, blocks, starts, visible);
    const Call numbers(a.op.op);
    const Argument k(numbers, "k", k_), base(a.op, "lse_base", lse_base_), entries(a.op, "entries", entries_),
        found(a.op, "found", found_), rest(a.op, "lse_rest", lse_rest_), zone(a.op, "zone", zone_),
        groups(a.op, "groups", groups_), space(a.op, "workspace", workspace_);
    entries.expect_rank({"R", "K"});
    const Dim R{"R", a.q.shape(0)}, G{"G", a.q.shape(1)}, K{"K", entries.shape(1)};
    if (zone.given()) zone.expect_rank({"R", "E"});
    k.expect({DType::i32}, {R}, "set by q").expect_contiguous();
    base.expect({DType::f32}, {R, G}, "set by q");
    entries.expect({DType::i32}, {R, K}, "set by q");
    found.expect({DType::i32}, {R, {"3", 3}}, "set by q").expect_contiguous();
    rest.expect({DType::f32}, {R, G}, "set by q");
    zone.expect({DType::i32}, {R, {"E", zone.given() ? zone.shape(1) : 0}}, "set by q");
    const int64_t size = summary_bytes(int_of(a.q.shape(2)));
    const int count = int_of(a.visible.shape(1) / ops::kGroupPages), super = (count + kSlots - 1) / kSlots;
    groups.expect({DType::u8}, {R, {"B", super}, {"bytes", size}}, "set by visible").expect_contiguous();
    std::vector<const unsigned char*> starts_of_groups;
    for (int64_t i = 0; groups.given() && i < R.size * super; ++i) {
        starts_of_groups.push_back(groups.data<unsigned char>() + i * size);
    }
    for (int64_t r = 0; r < R.size; ++r) {
        const int32_t most = k.data<int32_t>()[r];
        check(most >= 0 && most <= K.size, "select: k[", r, "] is ", most, ", expected 0 to ", K.size);
        ops::SelectRow& row = a.rows[r];
        row.lse_base = base.row<float>(r), row.selected = entries.row<int32_t>(r), row.most = most;
        row.lse_rest = rest.row<float>(r);
        row.zone = zone.row<int32_t>(r), row.zone_most = zone.given() ? int_of(zone.shape(1)) : 0;
        row.found = found.row<int32_t>(r);
        if (groups.given() && count > 0) row.group_blocks = starts_of_groups.data() + r * super;
        row.groups = count, row.expand = expand;
    }
    ops::SelectParams p = a.params(scale, weight, softcap, static_cast<ops::Aggregate>(aggregate), threads);
    p.mass = mass, p.least = least;
    p.workspace = workspace_of(a.op, space, ops::select_workspace_bytes(p, a.op.where));
    {
        const py::gil_scoped_release release;
        ops::select(p, a.op.where);
    }
    for (int64_t r = 0; a.op.on_host() && r < R.size; ++r) {
        found.row<int32_t>(r)[0] = a.rows[r].count;
        found.row<int32_t>(r)[1] = a.rows[r].unranked;
        found.row<int32_t>(r)[2] = a.rows[r].zone_count;
    }
}

void estimate(py::handle q, py::handle blocks, py::handle starts, py::handle visible, py::handle zone_, py::handle out_,
              py::handle lse_, py::handle unranked_, py::handle workspace_, float scale, float weight, float softcap,
              int threads) {
    const SelectArguments a("estimate", static_cast<int>(SummaryKind::mean_value), q, blocks, starts, visible);
    const Argument zone(a.op, "zone", zone_), out(a.op, "out", out_), lse(a.op, "lse", lse_),
        unranked(a.op, "unranked", unranked_), space(a.op, "workspace", workspace_);
    zone.expect_rank({"R", "E"});
    const Dim R{"R", a.q.shape(0)}, G{"G", a.q.shape(1)}, D{"D", a.q.shape(2)}, E{"E", zone.shape(1)};
    zone.expect({DType::i32}, {R, E}, "set by q");
    out.expect({DType::f32}, {R, G, D}, "set by q").expect_contiguous();
    lse.expect({DType::f32}, {R, G}, "set by q");
    unranked.expect({DType::i32}, {R}, "set by q").expect_contiguous();
    std::vector<ops::EstimateRow> rows;
    for (int64_t r = 0; r < R.size; ++r) {
        const ops::SelectRow& row = a.rows[r];
        const int32_t *const from = zone.row<int32_t>(r), *const end = from + E.size;
        const int64_t count = a.op.on_host() ? std::find(from, end, -1) - from : E.size;
        rows.push_back({row.q, row.q_stride_g, row.blocks, row.visible, from, row.entries, int_of(count),
                        out.row<float>(r), lse.row<float>(r), unranked.data<int32_t>() + r});
    }
    ops::EstimateParams p{rows.data(), int_of(R.size), int_of(G.size), int_of(D.size), a.q.dtype(),
                          scale,       weight,         softcap,        nullptr,        threads};
    p.workspace = workspace_of(a.op, space, ops::estimate_workspace_bytes(p, a.op.where));
    const py::gil_scoped_release release;
    ops::estimate(p, a.op.where);
}

}  // namespace

void bind_recall(py::module_& m) {
    m.def(
        "summary_bytes", [](int head_dim, int kind) { return summary_bytes(head_dim, static_cast<SummaryKind>(kind)); },
        py::arg("head_dim"), py::arg("kind"));
    m.def("cluster_workspace_bytes", &cluster_workspace_bytes<ops::cluster_workspace_bytes>, py::arg("rows"),
          py::arg("tokens"), py::arg("head_dim"), py::arg("threads"), py::arg("device"));
    m.def("cluster", &cluster, py::arg("keys"), py::arg("live"), py::arg("page_of"), py::arg("pages"),
          py::arg("workspace"), py::arg("iters"), py::arg("threads"));
    m.def("cluster_greedy_workspace_bytes", &cluster_workspace_bytes<ops::cluster_greedy_workspace_bytes>,
          py::arg("rows"), py::arg("tokens"), py::arg("head_dim"), py::arg("threads"), py::arg("device"));
    m.def("cluster_greedy", &cluster_greedy, py::arg("keys"), py::arg("live"), py::arg("page_of"), py::arg("pages"),
          py::arg("workspace"), py::arg("threads"));
    m.def("summarize", &summarize, py::arg("pages"), py::arg("visible"), py::arg("centre"), py::arg("blocks"),
          py::arg("pools"), py::arg("head_dim"), py::arg("kind"), py::arg("threads"));
    m.def(
        "select_workspace_bytes",
        &scan_workspace_bytes<ops::SelectParams, ops::SelectRow, &ops::SelectRow::entries, ops::select_workspace_bytes>,
        py::arg("rows"), py::arg("group"), py::arg("head_dim"), py::arg("entries"), py::arg("threads"),
        py::arg("device"));
    m.def("score_pages", &score_pages, py::arg("q"), py::arg("blocks"), py::arg("starts"), py::arg("visible"),
          py::arg("x"), py::arg("found"), py::arg("workspace"), py::arg("scale"), py::arg("spread_weight"),
          py::arg("softcap"), py::arg("kind"), py::arg("threads"));
    m.def("summarize_groups", &summarize_groups, py::arg("blocks"), py::arg("visible"), py::arg("groups"),
          py::arg("head_dim"), py::arg("kind"), py::arg("threads"));
    m.def("select", &select, py::arg("q"), py::arg("blocks"), py::arg("starts"), py::arg("visible"), py::arg("k"),
          py::arg("lse_base"), py::arg("entries"), py::arg("found"), py::arg("lse_rest"), py::arg("zone"),
          py::arg("groups"), py::arg("workspace"), py::arg("scale"), py::arg("spread_weight"), py::arg("softcap"),
          py::arg("kind"), py::arg("aggregate"), py::arg("mass"), py::arg("least"), py::arg("expand"),
          py::arg("threads"));
    m.def("estimate_workspace_bytes",
          &scan_workspace_bytes<ops::EstimateParams, ops::EstimateRow, &ops::EstimateRow::zone_count,
                                ops::estimate_workspace_bytes>,
          py::arg("rows"), py::arg("group"), py::arg("head_dim"), py::arg("zone"), py::arg("threads"),
          py::arg("device"));
    m.def("estimate", &estimate, py::arg("q"), py::arg("blocks"), py::arg("starts"), py::arg("visible"),
          py::arg("zone"), py::arg("out"), py::arg("lse"), py::arg("unranked"), py::arg("workspace"), py::arg("scale"),
          py::arg("spread_weight"), py::arg("softcap"), py::arg("threads"));
}

}  // namespace kvstrata::bind
