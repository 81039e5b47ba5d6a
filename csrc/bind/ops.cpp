// Ops on tensor views. All checks come before any work, and the work runs without the GIL.
#include <pybind11/stl.h>

#include "bind/bind.h"
#include "bind/tensors.h"
#include "common/check.h"
#include "common/huge_pages.h"
#include "common/layout.h"
#include "ops/append.h"
#include "ops/attend.h"
#include "ops/mass.h"
#include "ops/merge.h"
#include "ops/pack.h"
#include "ops/supported.h"

namespace kvstrata::bind {
namespace {

constexpr std::initializer_list<DType> kFloats = {DType::f32, DType::bf16, DType::f16};

void append(py::handle k_, py::handle v_, py::handle pages_, py::handle slots_, py::sequence pools_,
            py::handle position_, int threads) {
    const Call call("append", k_);
    const bool there = !call.on_host() && !Call("append", position_).on_host();
    const Argument k(call, "k", k_), v(call, "v", v_), pages(call, "pages", pages_), slots(call, "slots", slots_),
        position(there ? call : Call("append"), "position", position_);
    k.expect_rank({"R", "T", "D"});
    const int64_t R = k.shape(0), T = k.shape(1), D = k.shape(2);
    k.expect(kFloats, {{"R", R}, {"T", T}, {"D", D}});
    v.expect({k.dtype()}, {{"R", R}, {"T", T}, {"D", D}}, "as k");
    pages.expect({DType::i32}, {{"R", R}, {"T", T}}, "set by k");
    slots.expect({DType::u8}, {{"R", R}, {"T", T}}, "set by k");
    position.expect({DType::i32}, {{"R", R}}, "set by k").expect_contiguous();
    check(!there || T == 1, "append: position is on cuda, expected the CPU for T=", T, " tokens");
    const Pools pools(call, pools_);
    if (!call.on_host()) pools.expect_head_dim(static_cast<int>(D));
    std::vector<ops::AppendRow> rows(static_cast<size_t>(R));
    for (int64_t r = 0; r < R; ++r) {
        const PageId* ids = pages.row<PageId>(r);
        const uint8_t* at = slots.row<uint8_t>(r);
        for (int64_t t = 0; call.on_host() && t < T; ++t) {
            if (ids[t] == kNoPage) continue;
            pools.check_id(ids[t], static_cast<int>(D), {"pages", r, t});
            check(at[t] < kSlots, "append: slots[", r, ", ", t, "] is ", int{at[t]}, ", expected 0 to ", kSlots - 1);
        }
        rows[r] = {k.row<void>(r),
                   v.row<void>(r),
                   k.stride(1),
                   v.stride(1),
                   nullptr,
                   ids,
                   at,
                   static_cast<int32_t>(T),
                   there ? 0 : position.data<int32_t>()[r],
                   there ? position.data<int32_t>() + r : nullptr};
    }
    const ops::AppendParams params{rows.data(), static_cast<int32_t>(R), static_cast<int32_t>(D),
                                   k.dtype(),   pools.views(),           threads};
    py::gil_scoped_release release;
    ops::append(params, call.where);
}

ops::AttendParams attend_params(std::vector<ops::AttendRow>& rows, int group, int head_dim, int threads) {
    ops::AttendParams params{};
    params.rows = rows.data();
    params.n_rows = static_cast<int32_t>(rows.size());
    params.group = group;
    params.head_dim = head_dim;
    params.threads = threads;
    return params;
}

int64_t attend_workspace_bytes(int rows, int queries, int group, int head_dim, int entries, int threads, int device) {
    ops::AttendRow row{};
    row.entries = entries;
    row.queries = queries;
    std::vector<ops::AttendRow> all(static_cast<size_t>(rows), row);
    return ops::attend_workspace_bytes(attend_params(all, group, head_dim, threads), where_of(device));
}

struct AttendArguments {
    const Call call;
    Argument q, pages, visible, bias, centre, sinks, own, tree, q_pos, out, lse, logits, workspace;

    explicit AttendArguments(const py::dict& d)
        : call("attend", d["q"]),
          q(call, "q", d["q"]),
          pages(call, "pages", d["pages"]),
          visible(call, "visible", d["visible"]),
          bias(call, "bias", d["bias"]),
          centre(call, "centre", d["centre"]),
          sinks(call, "sinks", d["sinks"]),
          own("attend", "own", d["own"]),  // on the CPU
          tree(call, "tree", d["tree"]),
          q_pos(call, "q_pos", d["q_pos"]),
          out(call, "out", d["out"]),
          lse(call, "lse", d["lse"]),
          logits(call, "logits", d["want_logits"]),
          workspace(call, "workspace", d["workspace"]) {
        q.expect_rank({"R", "T", "G", "D"});
        pages.expect_rank({"R", "K"});
        const Dim R{"R", q.shape(0)}, T{"T", q.shape(1)}, G{"G", q.shape(2)}, D{"D", q.shape(3)},
            K{"K", pages.shape(1)};
        const Dim S{"16", kSlots};
        q.expect(kFloats, {R, T, G, D});
        pages.expect({DType::i32}, {R, K}, "R set by q");
        visible.expect({DType::u16}, {R, K}, "K set by pages");
        bias.expect({DType::f32}, {R, K, S}, "K set by pages").expect_contiguous();
        centre.expect({DType::f32}, {R, D}, "set by q");
        sinks.expect({DType::f32}, {R, G}, "set by q");
        own.expect({DType::i32}, {R}, "set by q").expect_contiguous();
        tree.expect({DType::u64, DType::i64}, {R, T}, "set by q");
        q_pos.expect({DType::i32}, {R, T}, "set by q");
        out.expect(kFloats, {R, T, G, D}, "as q");
        lse.expect({DType::f32}, {R, T, G}, "set by q");
        logits.expect({DType::f32}, {R, G, T, K, S}, "set by q and pages").expect_contiguous();
    }

    void check_ids(const Pools& pools) const {
        if (!call.on_host()) return pools.expect_head_dim(static_cast<int>(q.shape(3)));
        for (int64_t r = 0; r < q.shape(0); ++r) {
            const PageId* ids = pages.row<PageId>(r);
            const uint16_t* masks = visible.row<uint16_t>(r);
            for (int64_t e = 0; e < pages.shape(1); ++e) {  // what is not read may hold anything
                if (ids[e] == kNoPage || (masks && !masks[e])) continue;
                pools.check_id(ids[e], static_cast<int>(q.shape(3)), {"pages", r, e});
            }
        }
    }

    std::vector<ops::AttendRow> rows() const {
        std::vector<ops::AttendRow> rows(static_cast<size_t>(q.shape(0)));
        for (int64_t r = 0; r < q.shape(0); ++r) {
            ops::AttendRow& row = rows[r];
            row.q = q.row<void>(r);
            row.q_stride_t = q.stride(1), row.q_stride_g = q.stride(2);
            row.out = out.row<void>(r);
            row.out_stride_t = out.stride(1), row.out_stride_g = out.stride(2);
            row.lse = lse.row<float>(r);
            row.lse_stride_t = lse.stride(1), row.lse_stride_g = lse.stride(2);
            row.pages = pages.row<PageId>(r);
            row.visible = visible.row<uint16_t>(r);
            row.bias = bias.row<float>(r);
            row.centre = centre.row<float>(r);
            row.sinks = sinks.row<float>(r);
            row.q_pos = q_pos.row<int32_t>(r);
            row.tree = tree.row<uint64_t>(r);
            row.logits = logits.row<float>(r);
            row.entries = static_cast<int32_t>(pages.shape(1));
            row.queries = static_cast<int32_t>(q.shape(1));
            row.own = own.given() ? own.data<int32_t>()[r] : 0;
        }
        return rows;
    }
};

// One dict of tensors, because an op with this many of them is easier to call wrongly by position.
void attend(py::dict tensors, py::sequence pools_, float scale, float softcap, int window, int threads) {
    const AttendArguments a(tensors);
    const Pools pools(a.call, pools_, true);
    a.check_ids(pools);
    if (window > 0) pools.check_positions("a window is given");
    std::vector<ops::AttendRow> rows = a.rows();
    ops::AttendParams params =
        attend_params(rows, static_cast<int>(a.q.shape(2)), static_cast<int>(a.q.shape(3)), threads);
    params.q_dtype = a.q.dtype();
    params.out_dtype = a.out.dtype();
    params.pools = pools.views();
    params.scale = scale;
    params.softcap = softcap;
    params.window = window;
    params.workspace = workspace_of(a.call, a.workspace, ops::attend_workspace_bytes(params, a.call.where));
    py::gil_scoped_release release;
    ops::attend(params, a.call.where);
}

void merge(const py::sequence& outs_, const py::sequence& lses_, py::handle out_, py::handle lse_, int threads) {
    check(outs_.size() >= 1, "merge: outs has 0 parts, expected at least 1");
    check(outs_.size() == lses_.size(), "merge: lses has ", lses_.size(), " parts, expected ", outs_.size(),
          " (set by outs)");
    const Call call("merge", outs_[0]);
    const Argument first(call, "outs[0]", outs_[0]), out(call, "out", out_), lse(call, "lse", lse_);
    first.expect_rank({"N", "D"});
    const Dim N{"N", first.shape(0)}, D{"D", first.shape(1)};
    std::vector<const float*> outs, lses;
    for (size_t j = 0; j < outs_.size(); ++j) {
        const std::string part = message("outs[", j, "]"), weight = message("lses[", j, "]");
        const Argument o(call, part.c_str(), outs_[j]), l(call, weight.c_str(), lses_[j]);
        o.expect({DType::f32}, {N, D}, "set by outs[0]").expect_contiguous();
        l.expect({DType::f32}, {N}, "set by outs[0]").expect_contiguous();
        outs.push_back(o.data<float>());
        lses.push_back(l.data<float>());
    }
    out.expect(kFloats, {N, D}, "set by outs[0]").expect_contiguous();
    lse.expect({DType::f32}, {N}, "set by outs[0]").expect_contiguous();
    const ops::MergeParams params{outs.data(),
                                  lses.data(),
                                  static_cast<int32_t>(outs.size()),
                                  N.size,
                                  static_cast<int32_t>(D.size),
                                  out.data<void>(),
                                  out.dtype(),
                                  lse.data<float>(),
                                  threads};
    py::gil_scoped_release release;
    ops::merge(params, call.where);
}

void mass(py::handle logits_, py::handle lse_, py::handle mass_, int reduce, int threads) {
    const Call call("mass", logits_);
    const Argument logits(call, "logits", logits_), lse(call, "lse", lse_), out(call, "out", mass_);
    logits.expect_rank({"R", "G", "T", "K", "16"});
    const Dim R{"R", logits.shape(0)}, G{"G", logits.shape(1)}, T{"T", logits.shape(2)}, K{"K", logits.shape(3)};
    const Dim S{"16", kSlots};
    logits.expect({DType::f32}, {R, G, T, K, S}).expect_contiguous();
    lse.expect({DType::f32}, {R, G, T}, "set by logits").expect_contiguous();
    out.expect({DType::f32}, {R, K, S}, "set by logits").expect_contiguous();
    const auto n = [](const Dim& d) { return static_cast<int32_t>(d.size); };
    const ops::MassParams params{logits.data<float>(),
                                 lse.data<float>(),
                                 out.data<float>(),
                                 n(R),
                                 n(G),
                                 n(T),
                                 n(K),
                                 static_cast<ops::Reduce>(reduce),
                                 threads};
    py::gil_scoped_release release;
    ops::mass(params, call.where);
}

// Elements are of the pages' own type, codes are i8; all pages of a call that holds codes have one format.
struct CanonicalPages {
    Call call;
    Argument pages, k, v, scales;

    CanonicalPages(const char* op, py::handle pages_, py::handle k_, py::handle v_, py::handle scales_)
        : call(op, pages_),
          pages(call, "pages", pages_),
          k(call, "k", k_),
          v(call, "v", v_),
          scales(call, "scales", scales_) {
        pages.expect_rank({"P"}).expect({DType::i32}, {{"P", pages.shape(0)}}).expect_contiguous();
        k.expect_rank({"P", "16", "D"});
        const Dim P{"P", pages.shape(0)}, S{"16", kSlots}, D{"D", k.shape(2)};
        k.expect({DType::f32, DType::bf16, DType::f16, DType::i8}, {P, S, D}, "P set by pages").expect_contiguous();
        v.expect({k.dtype()}, {P, S, D}, "as k").expect_contiguous();
    }

    void check_formats(const Pools& pools) const {
        const PageId* ids = pages.data<PageId>();
        const int dim = static_cast<int>(k.shape(2));
        Format first = Format::f32;
        for (int64_t i = 0; i < pages.shape(0); ++i) {
            pools.check_id(ids[i], dim, {"pages", i});
            const Format format = pools.views()[page_pool(ids[i])].format;
            const DType wanted = is_full(format) ? static_cast<DType>(format) : DType::i8;
            check(wanted == k.dtype(), call, ": k has dtype ", ops::name(k.dtype()), ", expected ", ops::name(wanted),
                  " (the format of pages[", i, is_full(format) ? "])" : "] is quantized)");
            if (i == 0) first = format;
            check(format == first || is_full(format), call, ": pages[", i, "] has format ", ops::name(format),
                  ", expected ", ops::name(first), " (the format of pages[0])");
        }
        if (k.dtype() == DType::i8 && pages.shape(0)) check_scales(groups(first, dim));
    }

    // Where ids cannot be read: some pool has pages of such elements, or of codes with so many scales.
    void check_pools(const Pools& pools) const {
        const int dim = static_cast<int>(k.shape(2));
        pools.expect_head_dim(dim);
        if (!pages.shape(0)) return;
        const bool codes = k.dtype() == DType::i8;
        const int count = codes ? static_cast<int>(scales.expect_rank({"P", "2", "groups", "16"}).shape(2)) : 0;
        bool held = false;
        for (int i = 0; i < kMaxPools; ++i) {
            const PoolView& pool = pools.views()[i];
            const bool same = is_full(pool.format) ? static_cast<DType>(pool.format) == k.dtype() : codes;
            held |= pool.n_slabs && same && groups(pool.format, dim) == count;
        }
        check(held, call, ": k has dtype ", ops::name(k.dtype()), codes ? " and scales of " : "",
              codes ? message(count, " groups") : "", ", expected those of a pool's pages");
        if (codes) check_scales(count);
    }

  private:
    void check_scales(int count) const {
        const Dim P{"P", pages.shape(0)}, G{"groups", count}, S{"16", kSlots};
        scales.expect_rank({"P", "2", "groups", "16"});
        scales.expect({DType::bf16}, {P, {"2", 2}, G, S}, "set by pages").expect_contiguous();
    }
};

void convert_pages(const char* op, void (*work)(const ops::PackParams&, const Where&), py::handle pages, py::handle k,
                   py::handle v, py::handle scales, const py::sequence& pools_, int threads) {
    const CanonicalPages a(op, pages, k, v, scales);
    const Pools pools(a.call, pools_, true);
    a.call.on_host() ? a.check_formats(pools) : a.check_pools(pools);
    const ops::PackParams params{a.pages.data<PageId>(),
                                 static_cast<int32_t>(a.pages.shape(0)),
                                 static_cast<int32_t>(a.k.shape(2)),
                                 a.k.data<void>(),
                                 a.v.data<void>(),
                                 pools.views(),
                                 threads,
                                 a.scales.data<uint16_t>()};
    py::gil_scoped_release release;
    work(params, a.call.where);
}

py::dict supported() {
    py::dict d;
    py::list dims, formats, quantized;
    for (int tuned : ops::kTunedDims) dims.append(tuned);
    for (Format f : ops::kFormats) formats.append(ops::name(f));
    d["tuned_dims"] = dims;
    d["max_head_dim"] = kMaxHeadDim;
    d["max_group"] = ops::kMaxGroup;
    d["formats"] = formats;
    for (Format f : ops::kQuantized) quantized.append(ops::name(f));
    d["quantized"] = quantized;
    d["min_quantized_dim"] = kMinQuantizedDim;
    return d;
}

Format known_format(const char* op, int format, int head_dim) {
    const bool known = format >= 0 && format <= static_cast<int>(Format::int2);
    if (!known) throw Unsupported(message(op, ": format is ", format, ", expected 0 (f32) to 5 (int2)"));
    const Format f = static_cast<Format>(format);
    check(head_dim >= 1 && head_dim <= kMaxHeadDim, op, ": head_dim is ", head_dim, ", expected 1 to ", kMaxHeadDim);
    if (!is_full(f) && !quantizable(head_dim)) {
        throw Unsupported(message(op, ": head_dim is ", head_dim, ", expected a multiple of 16 in ", kMinQuantizedDim,
                                  " to ", kMaxHeadDim, " (format ", ops::name(f), ")"));
    }
    return f;
}

int64_t bytes_of_page(int format, int head_dim) {
    return page_bytes(known_format("page_bytes", format, head_dim), head_dim);
}
int groups_of_vector(int format, int head_dim) {
    return groups(known_format("scale_groups", format, head_dim), head_dim);
}

}  // namespace

void bind_ops(py::module_& m) {
    m.def("append", &append, py::arg("k"), py::arg("v"), py::arg("pages"), py::arg("slots"), py::arg("pools"),
          py::arg("position"), py::arg("threads"));
    m.def("attend_workspace_bytes", &attend_workspace_bytes, py::arg("rows"), py::arg("queries"), py::arg("group"),
          py::arg("head_dim"), py::arg("entries"), py::arg("threads"), py::arg("device"));
    m.def("attend", &attend, py::arg("tensors"), py::arg("pools"), py::arg("scale"), py::arg("softcap"),
          py::arg("window"), py::arg("threads"));
    m.def("merge", &merge, py::arg("outs"), py::arg("lses"), py::arg("out"), py::arg("lse"), py::arg("threads"));
    m.def("mass", &mass, py::arg("logits"), py::arg("lse"), py::arg("out"), py::arg("reduce"), py::arg("threads"));
    const auto convert = [&m](const char* name, void (*work)(const ops::PackParams&, const Where&)) {
        m.def(
            name,
            [name, work](py::handle pages, py::handle k, py::handle v, py::handle scales, const py::sequence& pools,
                         int threads) { convert_pages(name, work, pages, k, v, scales, pools, threads); },
            py::arg("pages"), py::arg("k"), py::arg("v"), py::arg("scales"), py::arg("pools"), py::arg("threads"));
    };
    convert("pack", &ops::pack);
    convert("unpack", &ops::unpack);
    m.def("page_bytes", &bytes_of_page, py::arg("format"), py::arg("head_dim"));
    m.def(
        "hint_huge_pages", [](uintptr_t data, int64_t bytes) { hint_huge_pages(reinterpret_cast<void*>(data), bytes); },
        py::arg("data"), py::arg("bytes"));
    m.def("scale_groups", &groups_of_vector, py::arg("format"), py::arg("head_dim"));
    m.def("supported", &supported);
}

}  // namespace kvstrata::bind
