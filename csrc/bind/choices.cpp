// The ops that choose what tokens become: choose_states.
#include "bind/bind.h"
#include "bind/tensors.h"
#include "common/check.h"
#include "ops/choose_states.h"

namespace kvstrata::bind {
namespace {

int64_t choose_states_workspace_bytes(int tokens, int threads) {
    ops::ChooseStatesParams p{};
    p.tokens = tokens, p.threads = threads;
    return ops::choose_states_workspace_bytes(p);
}

void choose_states(py::handle score_, py::handle now_, py::handle positions_, py::handle protect_,
                   py::handle full_pages_, py::handle quant_pages_, py::handle out_, py::handle workspace_,
                   int quantized, int threads) {
    const char* const op = "choose_states";
    const Argument score(op, "score", score_), now(op, "now", now_), positions(op, "positions", positions_),
        protect(op, "protect", protect_), full(op, "full_pages", full_pages_), quant(op, "quant_pages", quant_pages_),
        out(op, "out", out_), space(op, "workspace", workspace_);
    positions.expect_rank({"R", "N"});
    const Dim R{"R", positions.shape(0)}, N{"N", positions.shape(1)};
    positions.expect({DType::i32}, {R, N});
    score.expect({DType::f32}, {R, N}, "set by positions");
    now.expect({DType::u8}, {R, N}, "set by positions");
    protect.expect({DType::u8}, {R, N}, "set by positions");
    out.expect({DType::u8}, {R, N}, "set by positions").expect_contiguous();
    full.expect({DType::i64}, {R}, "set by positions");
    quant.expect({DType::i64}, {R}, "set by positions");
    std::vector<ops::ChooseStatesRow> rows(static_cast<size_t>(R.size));
    for (int64_t r = 0; r < R.size; ++r) {
        rows[r] = {score.row<float>(r), now.row<uint8_t>(r),   positions.row<int32_t>(r), protect.row<uint8_t>(r),
                   out.row<uint8_t>(r), *full.row<int64_t>(r), *quant.row<int64_t>(r)};
    }
    ops::ChooseStatesParams p{rows.data(), static_cast<int32_t>(R.size), static_cast<int32_t>(N.size), State{}, nullptr,
                              threads};
    check(quantized >= 0 && quantized < 256, op, ": quantized_state is ", quantized, ", expected one of [2, 3, 4]");
    p.quantized = static_cast<State>(quantized);
    p.workspace = workspace_of(op, space, ops::choose_states_workspace_bytes(p));
    py::gil_scoped_release release;
    ops::choose_states(p);
}

}  // namespace

void bind_choices(py::module_& m) {
    m.def("choose_states_workspace_bytes", &choose_states_workspace_bytes, py::arg("tokens"), py::arg("threads"));
    m.def("choose_states", &choose_states, py::arg("score"), py::arg("now"), py::arg("positions"), py::arg("protect"),
          py::arg("full_pages"), py::arg("quant_pages"), py::arg("out"), py::arg("workspace"),
          py::arg("quantized_state"), py::arg("threads"));
}

}  // namespace kvstrata::bind
