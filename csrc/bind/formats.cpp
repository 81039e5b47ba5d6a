// The ops that change a token's format or place: rotate, quantize, dequantize, compact.
#include <unordered_set>

#include "bind/bind.h"
#include "bind/tensors.h"
#include "common/check.h"
#include "common/layout.h"
#include "ops/compact.h"
#include "ops/quantize.h"
#include "ops/rotate.h"
#include "ops/supported.h"

namespace kvstrata::bind {
namespace {

void rotate(py::handle x_, py::handle out_, bool inverse, int threads) {
    const Call call("rotate", x_);
    const Argument x(call, "x", x_), out(call, "out", out_);
    x.expect_rank({"N", "D"});
    const Dim N{"N", x.shape(0)}, D{"D", x.shape(1)};
    x.expect({DType::f32}, {N, D}).expect_contiguous();
    out.expect({DType::f32}, {N, D}, "as x").expect_contiguous();
    const ops::RotateParams params{x.data<float>(), out.data<float>(), N.size, static_cast<int32_t>(D.size), inverse,
                                   threads};
    py::gil_scoped_release release;
    ops::rotate(params, call.where);
}

// The moves of a call, checked: places exist, each page is written in one run, no slot twice, nothing read is written. Those
// on a device are not read; every pool is of one head_dim then.
class Moves {
  public:
    Moves(const Call& call, py::handle moves, const Pools& pools)
        : op_(call), pools_(pools), view_(call, "moves", moves) {
        view_.expect_rank({"n", "4"});
        view_.expect({DType::i32}, {{"n", view_.shape(0)}, {"4", 4}}).expect_contiguous();
        if (op_.on_host()) {
            check_moves();
        } else {
            head_dim_ = pools.head_dim();
            pools.expect_head_dim(head_dim_);
        }
    }

    const ops::Move* data() const { return view_.data<ops::Move>(); }
    int32_t count() const { return static_cast<int32_t>(view_.shape(0)); }
    int32_t head_dim() const { return head_dim_; }  // 0: every move is skipped
    Format format(PageId id) const { return pools_.views()[page_pool(id)].format; }

  private:
    void check_moves() {
        std::unordered_set<PageId> written;
        PageId page = kNoPage;
        unsigned slots = 0;
        for (int i = 0; i < count(); ++i) {
            const ops::Move& m = data()[i];
            if (m.from == kNoPage || m.to == kNoPage) continue;
            if (!head_dim_) head_dim_ = pools_.head_dim(m.to);
            pools_.check_id(m.to, head_dim_, {"moves", i, 2});  // first: it set head_dim, or names no pool
            pools_.check_id(m.from, head_dim_, {"moves", i, 0});
            check_slot(i, 1, m.from_slot), check_slot(i, 3, m.to_slot);
            if (m.to != page) {
                check(written.insert(m.to).second, op_, ": moves[", i, ", 2] comes back to page ", m.to,
                      ", expected the moves into one page to follow each other");
                page = m.to, slots = 0;
            }
            check(!(slots >> m.to_slot & 1), op_, ": moves[", i, "] writes slot ", m.to_slot, " of page ", m.to,
                  " again, expected each slot once");
            slots |= 1u << m.to_slot;
        }
        for (int i = 0; i < count(); ++i) {
            const ops::Move& m = data()[i];
            if (m.from == kNoPage || m.to == kNoPage) continue;
            check(!written.count(m.from), op_, ": moves[", i, ", 0] reads page ", m.from,
                  ", expected one that is not written to");
        }
    }
    void check_slot(int i, int column, int32_t slot) const {
        check(slot >= 0 && slot < kSlots, op_, ": moves[", i, ", ", column, "] is ", slot, ", expected slot 0 to ",
              kSlots - 1);
    }
    const Call op_;
    const Pools& pools_;
    const Argument view_;
    int32_t head_dim_ = 0;
};

// Centre and row_of come together or not at all; every row_of[i] that is read names a row of centre.
struct Centre {
    Argument centre, row_of;

    Centre(const Call& op, py::handle centre_, py::handle row_of_, Dim n, const char* set_by)
        : centre(op, "centre", centre_), row_of(op, "row_of", row_of_) {
        check(centre.given() == row_of.given(), op, ": ", centre.given() ? "row_of" : "centre",
              " is missing, expected centre and row_of together");
        if (centre.given()) centre.expect_rank({"R", "D"});
        row_of.expect({DType::i32}, {n}, set_by).expect_contiguous();
    }
    void check_dim(int head_dim) const {
        if (!centre.given()) return;
        centre.expect({DType::f32}, {{"R", centre.shape(0)}, {"D", head_dim}}, "D set by pools").expect_contiguous();
    }
    void check_row(const char* op, int64_t i) const {
        if (!centre.given()) return;
        const int32_t row = row_of.data<int32_t>()[i];
        check(row >= 0 && row < centre.shape(0), op, ": row_of[", i, "] is ", row, ", expected a row of centre, 0 to ",
              centre.shape(0) - 1);
    }
};

void check_bits(int i, Format from, Format to) {
    check(!is_full(to), "quantize: moves[", i, "] goes to a page of format ", ops::name(to),
          ", expected int8, int4 or int2");
    check(format_bits(to) < format_bits(from), "quantize: moves[", i, "] goes from ", ops::name(from), " to ",
          ops::name(to), ", expected fewer bits", from == to ? " (compact copies within a format)" : "");
}

void quantize(py::handle moves_, const py::sequence& pools_, py::handle centre_, py::handle row_of_, int threads) {
    const Call call("quantize", moves_);
    const Pools pools(call, pools_, true);
    const Moves moves(call, moves_, pools);
    const Centre centre(call, centre_, row_of_, {"n", moves.count()}, "set by moves");
    if (!moves.head_dim()) return;
    centre.check_dim(moves.head_dim());
    for (int i = 0; call.on_host() && i < moves.count(); ++i) {
        const ops::Move& m = moves.data()[i];
        if (ops::skipped(m)) continue;
        check_bits(i, moves.format(m.from), moves.format(m.to));
        if (is_full(moves.format(m.from))) centre.check_row("quantize", i);
    }
    const ops::QuantizeParams params{moves.data(),
                                     centre.centre.data<float>(),
                                     centre.row_of.data<int32_t>(),
                                     moves.count(),
                                     moves.head_dim(),
                                     pools.views(),
                                     threads};
    py::gil_scoped_release release;
    ops::quantize(params, call.where);
}

void dequantize(py::handle pages_, py::handle k_, py::handle v_, const py::sequence& pools_, py::handle centre_,
                py::handle row_of_, int threads) {
    const Call call("dequantize", pages_);
    const Argument pages(call, "pages", pages_), k(call, "k", k_), v(call, "v", v_);
    pages.expect_rank({"P"}).expect({DType::i32}, {{"P", pages.shape(0)}}).expect_contiguous();
    k.expect_rank({"P", "16", "D"});
    const Dim P{"P", pages.shape(0)}, S{"16", kSlots}, D{"D", k.shape(2)};
    k.expect({DType::f32}, {P, S, D}, "P set by pages").expect_contiguous();
    v.expect({DType::f32}, {P, S, D}, "as k").expect_contiguous();
    const Pools pools(call, pools_, true);
    const Centre centre(call, centre_, row_of_, P, "set by pages");
    centre.check_dim(static_cast<int>(D.size));
    if (!call.on_host()) pools.expect_head_dim(static_cast<int>(D.size));
    for (int64_t i = 0; call.on_host() && i < P.size; ++i) {
        const PageId id = pages.data<PageId>()[i];
        pools.check_id(id, static_cast<int>(D.size), {"pages", i});
        if (!is_full(pools.views()[page_pool(id)].format)) centre.check_row(call.op, i);
    }
    const ops::DequantizeParams params{pages.data<PageId>(),
                                       centre.centre.data<float>(),
                                       centre.row_of.data<int32_t>(),
                                       static_cast<int32_t>(P.size),
                                       static_cast<int32_t>(D.size),
                                       k.data<float>(),
                                       v.data<float>(),
                                       pools.views(),
                                       threads};
    py::gil_scoped_release release;
    ops::dequantize(params, call.where);
}

void compact(py::handle moves_, const py::sequence& pools_, int threads) {
    const Call call("compact", moves_);
    const Pools pools(call, pools_, true);
    const Moves moves(call, moves_, pools);
    if (!moves.head_dim()) return;
    for (int i = 0; call.on_host() && i < moves.count(); ++i) {
        const ops::Move& m = moves.data()[i];
        if (ops::skipped(m)) continue;
        const Format from = moves.format(m.from), to = moves.format(m.to);
        check(from == to, "compact: moves[", i, "] goes from ", ops::name(from), " to ", ops::name(to),
              ", expected pages of one format");
    }
    const ops::CompactParams params{moves.data(), moves.count(), moves.head_dim(), pools.views(), threads};
    py::gil_scoped_release release;
    ops::compact(params, call.where);
}

}  // namespace

void bind_formats(py::module_& m) {
    m.def("rotate", &rotate, py::arg("x"), py::arg("out"), py::arg("inverse"), py::arg("threads"));
    m.def("quantize", &quantize, py::arg("moves"), py::arg("pools"), py::arg("centre"), py::arg("row_of"),
          py::arg("threads"));
    m.def("dequantize", &dequantize, py::arg("pages"), py::arg("k"), py::arg("v"), py::arg("pools"), py::arg("centre"),
          py::arg("row_of"), py::arg("threads"));
    m.def("compact", &compact, py::arg("moves"), py::arg("pools"), py::arg("threads"));
}

}  // namespace kvstrata::bind
