// The ops that choose what tokens become: choose_states, chunk_order, choose_chunks.
#include "bind/bind.h"
#include "bind/tensors.h"
#include "common/check.h"
#include "ops/choose_chunks.h"
#include "ops/choose_states.h"
#include "ops/chunk_order.h"

namespace kvstrata::bind {
namespace {

int32_t int_of(int64_t n) { return static_cast<int32_t>(n); }

int64_t choose_states_workspace_bytes(int rows, int tokens, int threads, int device) {
    ops::ChooseStatesParams p{};
    p.n_rows = rows, p.tokens = tokens, p.threads = threads;
    return ops::choose_states_workspace_bytes(p, where_of(device));
}

void choose_states(py::handle score_, py::handle now_, py::handle positions_, py::handle protect_,
                   py::handle full_pages_, py::handle quant_pages_, py::handle out_, py::handle workspace_,
                   int quantized, int threads) {
    const Call op("choose_states", positions_);
    const Call numbers(op.op);  // pages travel by value, wherever the tokens lie
    const Argument score(op, "score", score_), now(op, "now", now_), positions(op, "positions", positions_),
        protect(op, "protect", protect_), full(numbers, "full_pages", full_pages_),
        quant(numbers, "quant_pages", quant_pages_), out(op, "out", out_), space(op, "workspace", workspace_);
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
    ops::ChooseStatesParams p{rows.data(), int_of(R.size), int_of(N.size), State{}, nullptr, threads};
    check(quantized >= 0 && quantized < 256, op, ": quantized_state is ", quantized, ", expected one of [2, 3, 4]");
    p.quantized = static_cast<State>(quantized);
    p.workspace = workspace_of(op, space, ops::choose_states_workspace_bytes(p, op.where));
    py::gil_scoped_release release;
    ops::choose_states(p, op.where);
}

int64_t chunk_order_workspace_bytes(int rows, int tokens, int threads, int device) {
    ops::ChunkOrderParams p{};
    p.n_rows = rows, p.tokens = tokens, p.threads = threads;
    return ops::chunk_order_workspace_bytes(p, where_of(device));
}

void chunk_order(py::handle value_, py::handle kind_, py::handle pos_, py::handle order_, py::handle w_,
                 py::handle items_, py::handle workspace_, int threads) {
    const Call op("chunk_order", value_);
    const Argument value(op, "value", value_), kind(op, "kind", kind_), pos(op, "pos", pos_),
        order(op, "order", order_), w(op, "w", w_), items(op, "items", items_), space(op, "workspace", workspace_);
    value.expect_rank({"R", "N"});
    w.expect_rank({"R", "M"});
    const Dim R{"R", value.shape(0)}, N{"N", value.shape(1)}, M{"M", w.shape(1)};
    value.expect({DType::f32}, {R, N});
    kind.expect({DType::u8}, {R, N}, "set by value");
    pos.expect({DType::i32}, {R, N}, "set by value");
    order.expect({DType::i32}, {R, N}, "set by value").expect_contiguous();
    w.expect({DType::f32}, {R, M}, "set by value").expect_contiguous();
    items.expect({DType::i32}, {R}, "set by value");
    std::vector<ops::ChunkOrderRow> rows(static_cast<size_t>(R.size));
    for (int64_t r = 0; r < R.size; ++r) {
        rows[r] = {value.row<float>(r),   kind.row<uint8_t>(r), pos.row<int32_t>(r),
                   order.row<int32_t>(r), w.row<float>(r),      items.row<int32_t>(r)};
    }
    ops::ChunkOrderParams p{rows.data(), int_of(R.size), int_of(N.size), int_of(M.size), nullptr, threads};
    p.workspace = workspace_of(op, space, ops::chunk_order_workspace_bytes(p, op.where));
    py::gil_scoped_release release;
    ops::chunk_order(p, op.where);
}

int64_t choose_chunks_workspace_bytes(int items, int steps, int ladders, int device) {
    ops::ChooseChunksParams p{};
    p.items = items, p.steps = steps, p.ladders = ladders;
    return ops::choose_chunks_workspace_bytes(p, where_of(device));
}

// found: the bits of lambda, an f64, and the sum of the costs.
void choose_chunks(py::handle w_, py::handle ladder_, py::handle cost_, py::handle fidelity_, int64_t budget,
                   py::handle step_, py::handle found_, py::handle workspace_) {
    const Call op("choose_chunks", w_);
    const Argument w(op, "w", w_), ladder(op, "ladder", ladder_), cost(op, "cost", cost_),
        fidelity(op, "fidelity", fidelity_), step(op, "step", step_), found(op, "found", found_),
        space(op, "workspace", workspace_);
    w.expect_rank({"n"});
    cost.expect_rank({"J", "F"});
    const Dim n{"n", w.shape(0)}, J{"J", cost.shape(0)}, F{"F", cost.shape(1)};
    w.expect({DType::f32}, {n});
    ladder.expect({DType::u8}, {n}, "set by w");
    cost.expect({DType::i64}, {J, F}).expect_contiguous();
    fidelity.expect({DType::f32}, {J, F}, "set by cost").expect_contiguous();
    step.expect({DType::u8}, {n}, "set by w");
    found.expect({DType::i64}, {{"2", 2}}).expect_contiguous();
    ops::ChooseChunksParams p{};
    p.w = w.data<float>(), p.ladder = ladder.data<uint8_t>();
    p.cost = cost.data<int64_t>(), p.fidelity = fidelity.data<float>(), p.budget = budget;
    p.items = int_of(n.size), p.steps = int_of(J.size), p.ladders = int_of(F.size);
    p.step = step.data<uint8_t>(), p.level = found.data<double>(), p.held = found.data<int64_t>() + 1;
    p.workspace = workspace_of(op, space, ops::choose_chunks_workspace_bytes(p, op.where));
    py::gil_scoped_release release;
    ops::choose_chunks(p, op.where);
}

}  // namespace

void bind_choices(py::module_& m) {
    m.def("choose_states_workspace_bytes", &choose_states_workspace_bytes, py::arg("rows"), py::arg("tokens"),
          py::arg("threads"), py::arg("device"));
    m.def("choose_states", &choose_states, py::arg("score"), py::arg("now"), py::arg("positions"), py::arg("protect"),
          py::arg("full_pages"), py::arg("quant_pages"), py::arg("out"), py::arg("workspace"),
          py::arg("quantized_state"), py::arg("threads"));
    m.def("most_chunks", &ops::most_chunks, py::arg("tokens"));
    m.def("chunk_order_workspace_bytes", &chunk_order_workspace_bytes, py::arg("rows"), py::arg("tokens"),
          py::arg("threads"), py::arg("device"));
    m.def("chunk_order", &chunk_order, py::arg("value"), py::arg("kind"), py::arg("pos"), py::arg("order"),
          py::arg("w"), py::arg("items"), py::arg("workspace"), py::arg("threads"));
    m.def("choose_chunks_workspace_bytes", &choose_chunks_workspace_bytes, py::arg("items"), py::arg("steps"),
          py::arg("ladders"), py::arg("device"));
    m.def("choose_chunks", &choose_chunks, py::arg("w"), py::arg("ladder"), py::arg("cost"), py::arg("fidelity"),
          py::arg("budget"), py::arg("step"), py::arg("found"), py::arg("workspace"));
}

}  // namespace kvstrata::bind
