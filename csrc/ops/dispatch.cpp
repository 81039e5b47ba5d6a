// The border of every op: checks what the params say about themselves, once, then calls the backend. Tensor shapes are
// checked where tensors are seen (bind); page ids belong to whoever keeps the tables and are checked here on request.
#include <cmath>
#include <cstring>

#include "ops/backends.h"
#include "ops/border.h"
#include "ops/transfer.h"

namespace kvstrata::ops {
namespace {

// Likewise, or a format that this op does not read.
void check_full_page(const char* op, const PoolView* pools, PageId id, int row, int entry) {
    const Format format = check_page(op, pools, id, row, entry).format;
    if (!is_full(format)) {
        throw Unsupported(
            message(op, ": pages[", row, ", ", entry, "] has format ", name(format), ", expected f32, bf16 or f16"));
    }
}

// If checks_ids: both ends of every move.
void check_moves(const char* op, const Move* moves, int count, const PoolView* pools, const Where& where) {
    for (int i = 0; checks_ids(where) && i < count; ++i) {
        const Move& m = moves[i];
        if (skipped(m)) continue;
        check_page(op, pools, m.from, i, 0);
        check_page(op, pools, m.to, i, 2);
        check(m.from_slot >= 0 && m.from_slot < kSlots && m.to_slot >= 0 && m.to_slot < kSlots, op, ": moves[", i,
              "] goes from slot ", m.from_slot, " to slot ", m.to_slot, ", expected 0 to ", kSlots - 1);
    }
}

// Likewise, or a format that cannot hold this head dimension.
void check_readable_page(const char* op, const AttendParams& p, PageId id, int row, int entry) {
    if (!is_full(check_page(op, p.pools, id, row, entry).format)) check_quantizable(op, p.head_dim);
}

void check_own(const AttendRow& row, int r, const Where& where) {
    const int most = row.tree ? kMaxTreeOwn : row.queries;
    check(row.own >= 0 && row.own <= most, "attend: own[", r, "] is ", row.own, ", expected 0 to ", most,
          row.tree ? " (bits of tree)" : " (T)");
    if (!where.on_host()) return;
    int seen = 0;
    for (int e = row.entries - 1; e >= 0 && seen < row.own; --e) {
        if (row.pages[e] >= 0) seen += __builtin_popcount(row.visible ? row.visible[e] : kAllSlots);
    }
    check(seen >= row.own, "attend: own[", r, "] is ", row.own, ", expected at most the row's ", seen,
          " visible slots");
}

void check_row(const AttendParams& p, int r, const Where& where) {
    const AttendRow& row = p.rows[r];
    check(row.entries >= 0 && row.queries >= 0, "attend: row ", r, " has ", row.entries, " entries and ", row.queries,
          " queries, expected at least 0");
    if (row.own) check_own(row, r, where);
    check(p.window == 0 || row.q_pos || !row.queries, "attend: q_pos is missing, expected [T] (window is ", p.window,
          ")");
    if (!checks_ids(where)) return;
    for (int e = 0; e < row.entries; ++e) {
        if (row.pages[e] >= 0 && (!row.visible || row.visible[e])) check_readable_page("attend", p, row.pages[e], r, e);
    }
}

// If checks_ids: every entry that a row reads.
template <class Row>
void check_entries(const char* op, const PoolView* pools, const Row& row, int r, const Where& where) {
    for (int e = 0; checks_ids(where) && e < row.entries; ++e) {
        if (row.pages[e] >= 0 && (!row.visible || row.visible[e])) check_page(op, pools, row.pages[e], r, e);
    }
}

// What window queries of any number share.
void check_queries(const char* op, const WindowParams& p, const Where& where) {
    check_shape(op, p.head_dim, p.group);
    check_float(op, "q", p.q_dtype);
    check(std::isfinite(p.scale), op, ": scale is ", p.scale, ", expected a finite number");
    check(p.softcap >= 0 && std::isfinite(p.softcap), op, ": softcap is ", p.softcap, ", expected 0 (none) or more");
    for (int r = 0; r < p.n_rows; ++r) check_entries(op, p.pools, p.rows[r], r, where);
}

void check_window(const char* op, const WindowParams& p, const Where& where) {
    check_queries(op, p, where);
    check(p.window >= 0, op, ": window is ", p.window, ", expected 0 (none) or more");
    for (int r = 0; r < p.n_rows; ++r) {
        const WindowRow& row = p.rows[r];
        check(row.queries >= 0 && row.queries <= kMaxWindowQueries, op, ": row ", r, " has ", row.queries,
              " queries, expected 0 to ", kMaxWindowQueries);
        check(row.q_pos || !p.window || !row.queries, op, ": q_pos is missing, expected [W] (window is ", p.window,
              ")");
    }
}

void check_spans(const ScoreMaxParams& p) {
    for (int e = 0; e <= p.n_spans; ++e) {
        const int from = e ? p.spans[e - 1] : 0;
        check(p.spans[e] >= from && p.spans[e] <= p.queries, "score_max: spans[", e, "] is ", p.spans[e], ", expected ",
              from, " to ", p.queries, " (W)");
    }
}

// States that a row names, of its tokens.
void check_states(const ChooseStatesRow& row, int tokens, int r) {
    constexpr int kLast = static_cast<int>(State::int2);
    int unknown = 0;
    for (int i = 0; i < tokens; ++i) unknown |= (row.positions[i] >= 0) & (row.now[i] > kLast);
    for (int i = 0; unknown && i < tokens; ++i) {
        check(row.positions[i] < 0 || row.now[i] <= kLast, "choose_states: now[", r, ", ", i, "] is ",
              static_cast<int>(row.now[i]), ", expected 0 to ", kLast);
    }
}

// The ladders of choose_chunks: costs rise, until a shorter ladder repeats its last step.
void check_ladders(const ChooseChunksParams& p) {
    check(p.steps >= 1 && p.steps <= 256 && p.ladders <= 256 && (p.ladders >= 1 || !p.items),
          "choose_chunks: cost is [", p.steps, ", ", p.ladders, "], expected 1 to 256 steps of 1 to 256 ladders");
    for (int f = 0; f < p.ladders; ++f) {
        int64_t rise = 1;
        for (int j = 0; j < p.steps; ++j) {
            const int64_t before = rise, cost = p.cost[j * p.ladders + f];
            check(std::isfinite(p.fidelity[j * p.ladders + f]), "choose_chunks: fidelity[", j, ", ", f, "] is ",
                  p.fidelity[j * p.ladders + f], ", expected a finite number");
            if (j == 0) continue;
            const int64_t below = p.cost[(j - 1) * p.ladders + f];
            rise = cost - below;
            check(rise >= 0 && (rise == 0 || before > 0), "choose_chunks: cost[", j, ", ", f, "] is ", cost,
                  before > 0 ? ", expected at least " : ", expected the last of a shorter ladder, ", below);
        }
    }
}

}  // namespace

void append(const AppendParams& p, const Where& where) {
    check_shape("append", p.head_dim);
    check_float("append", "k", p.dtype);
    for (int r = 0; checks_ids(where) && r < p.n_rows; ++r) {
        for (int t = 0; t < p.rows[r].count; ++t) {
            if (p.rows[r].pages[t] >= 0) check_full_page("append", p.pools, p.rows[r].pages[t], r, t);
        }
    }
    where.on_host() ? cpu::append(p) : cuda::append(p, where);
}

int64_t attend_workspace_bytes(const AttendParams& p, const Where& where) {
    check_shape("attend", p.head_dim, p.group);
    return where.on_host() ? cpu::attend_workspace_bytes(p) : cuda::attend_workspace_bytes(p);
}

void attend(const AttendParams& p, const Where& where) {
    check_shape("attend", p.head_dim, p.group);
    check_float("attend", "q", p.q_dtype);
    check_float("attend", "out", p.out_dtype);
    check(std::isfinite(p.scale), "attend: scale is ", p.scale, ", expected a finite number");
    check(p.softcap >= 0 && std::isfinite(p.softcap), "attend: softcap is ", p.softcap, ", expected 0 (none) or more");
    check(p.window >= 0, "attend: window is ", p.window, ", expected 0 (none) or more");
    for (int r = 0; r < p.n_rows; ++r) check_row(p, r, where);
    where.on_host() ? cpu::attend(p) : cuda::attend(p, where);
}

void merge(const MergeParams& p, const Where& where) {
    check_shape("merge", p.head_dim);
    check_float("merge", "out", p.out_dtype);
    check(p.parts >= 1, "merge: parts is ", p.parts, ", expected at least 1");
    where.on_host() ? cpu::merge(p) : cuda::merge(p, where);
}

void mass(const MassParams& p, const Where& where) {
    check_shape("mass", 1, p.group);
    check(p.reduce <= Reduce::max, "mass: reduce is ", static_cast<int>(p.reduce), ", expected sum, mean or max");
    where.on_host() ? cpu::mass(p) : cuda::mass(p, where);
}

static void check_pack(const char* op, const PackParams& p, const Where& where) {
    check_shape(op, p.head_dim);
    for (int i = 0; checks_ids(where) && i < p.n_pages; ++i) check_page(op, p.pools, p.pages[i], 0, i);
}

void pack(const PackParams& p, const Where& where) {
    check_pack("pack", p, where);
    where.on_host() ? cpu::pack(p) : cuda::pack(p, where);
}

void unpack(const PackParams& p, const Where& where) {
    check_pack("unpack", p, where);
    where.on_host() ? cpu::unpack(p) : cuda::unpack(p, where);
}

void rotate(const RotateParams& p, const Where& where) {
    check_quantizable("rotate", p.head_dim);
    where.on_host() ? cpu::rotate(p) : cuda::rotate(p, where);
}

void quantize(const QuantizeParams& p, const Where& where) {
    check_quantizable("quantize", p.head_dim);
    check_moves("quantize", p.moves, p.n_moves, p.pools, where);
    where.on_host() ? cpu::quantize(p) : cuda::quantize(p, where);
}

void dequantize(const DequantizeParams& p, const Where& where) {
    check_shape("dequantize", p.head_dim);
    for (int i = 0; checks_ids(where) && i < p.n_pages; ++i) check_page("dequantize", p.pools, p.pages[i], 0, i);
    where.on_host() ? cpu::dequantize(p) : cuda::dequantize(p, where);
}

void compact(const CompactParams& p, const Where& where) {
    check_shape("compact", p.head_dim);
    check_moves("compact", p.moves, p.n_moves, p.pools, where);
    where.on_host() ? cpu::compact(p) : cuda::compact(p, where);
}

int64_t score_window_workspace_bytes(const ScoreWindowParams& p, const Where& where) {
    check_shape("score_window", p.head_dim, p.group);
    return where.on_host() ? cpu::score_window_workspace_bytes(p) : cuda::score_window_workspace_bytes(p);
}

void score_window(const ScoreWindowParams& p, const Where& where) {
    check_window("score_window", p, where);
    check(p.spread <= Spread::std, "score_window: spread is ", static_cast<int>(p.spread),
          ", expected none, variance or std");
    check(p.weight >= 0 && std::isfinite(p.weight), "score_window: weight is ", p.weight, ", expected 0 or more");
    where.on_host() ? cpu::score_window(p) : cuda::score_window(p, where);
}

int64_t score_max_workspace_bytes(const ScoreMaxParams& p, const Where& where) {
    check_shape("score_max", p.head_dim);
    return where.on_host() ? cpu::score_max_workspace_bytes(p) : cuda::score_max_workspace_bytes(p);
}

void score_max(const ScoreMaxParams& p, const Where& where) {
    check_queries("score_max", p, where);
    if (where.on_host()) check_spans(p);
    where.on_host() ? cpu::score_max(p) : cuda::score_max(p, where);
}

int64_t measure_workspace_bytes(const MeasureParams& p, const Where& where) {
    check_shape("measure", p.head_dim, p.group);
    return where.on_host() ? cpu::measure_workspace_bytes(p) : cuda::measure_workspace_bytes(p);
}

void measure(const MeasureParams& p, const Where& where) {
    check_window("measure", p, where);
    check(p.which <= Stats::code, "measure: stats is ", static_cast<int>(p.which), ", expected sound or code");
    for (int r = 0; r < p.n_rows; ++r) {
        check(p.rows[r].q_pos || !p.rows[r].queries, "measure: q_pos is missing, expected [W]");
    }
    where.on_host() ? cpu::measure(p) : cuda::measure(p, where);
}

int64_t pool_workspace_bytes(const PoolParams& p, const Where& where) {
    return where.on_host() ? cpu::pool_workspace_bytes(p) : cuda::pool_workspace_bytes(p);
}

void pool(const PoolParams& p, const Where& where) {
    check_shape("pool", 1, p.group);
    check(p.kernel > 0 && p.kernel % 2 == 1, "pool: kernel is ", p.kernel, ", expected an odd number of tokens");
    for (int r = 0; r < p.n_rows; ++r) check_entries("pool", p.pools, p.rows[r], r, where);
    where.on_host() ? cpu::pool(p) : cuda::pool(p, where);
}

void accumulate(const AccumulateParams& p, const Where& where) {
    check(std::isfinite(p.decay), "accumulate: decay is ", p.decay, ", expected a finite number");
    where.on_host() ? cpu::accumulate(p) : cuda::accumulate(p, where);
}

int64_t score_keys_workspace_bytes(const ScoreKeysParams& p, const Where& where) {
    check_shape("score_keys", p.head_dim);
    return where.on_host() ? cpu::score_keys_workspace_bytes(p) : cuda::score_keys_workspace_bytes(p);
}

void score_keys(const ScoreKeysParams& p, const Where& where) {
    check_shape("score_keys", p.head_dim);
    for (int r = 0; r < p.n_rows; ++r) check_entries("score_keys", p.pools, p.rows[r], r, where);
    where.on_host() ? cpu::score_keys(p) : cuda::score_keys(p, where);
}

int64_t choose_states_workspace_bytes(const ChooseStatesParams& p, const Where& where) {
    return where.on_host() ? cpu::choose_states_workspace_bytes(p) : cuda::choose_states_workspace_bytes(p);
}

void choose_states(const ChooseStatesParams& p, const Where& where) {
    check(p.quantized >= State::int8 && p.quantized <= State::int2, "choose_states: quantized_state is ",
          static_cast<int>(p.quantized), ", expected one of [2, 3, 4]");
    for (int r = 0; r < p.n_rows; ++r) {
        const ChooseStatesRow& row = p.rows[r];
        check(row.full_pages >= 0, "choose_states: full_pages[", r, "] is ", row.full_pages, ", expected at least 0");
        check(row.quant_pages >= 0, "choose_states: quant_pages[", r, "] is ", row.quant_pages,
              ", expected at least 0");
        if (where.on_host()) check_states(row, p.tokens, r);
    }
    where.on_host() ? cpu::choose_states(p) : cuda::choose_states(p, where);
}

int64_t chunk_order_workspace_bytes(const ChunkOrderParams& p, const Where& where) {
    return where.on_host() ? cpu::chunk_order_workspace_bytes(p) : cuda::chunk_order_workspace_bytes(p);
}

void chunk_order(const ChunkOrderParams& p, const Where& where) {
    check(p.chunks >= most_chunks(p.tokens), "chunk_order: w has ", p.chunks, " chunks, expected at least ",
          most_chunks(p.tokens), " for ", p.tokens, " tokens");
    where.on_host() ? cpu::chunk_order(p) : cuda::chunk_order(p, where);
}

int64_t choose_chunks_workspace_bytes(const ChooseChunksParams& p, const Where& where) {
    return where.on_host() ? cpu::choose_chunks_workspace_bytes(p) : cuda::choose_chunks_workspace_bytes(p);
}

static void check_items(const ChooseChunksParams& p) {
    check_ladders(p);
    int64_t lowest = 0;
    for (int i = 0; i < p.items; ++i) {
        check(p.w[i] >= 0 && std::isfinite(p.w[i]), "choose_chunks: w[", i, "] is ", p.w[i],
              ", expected a finite number, 0 or more");
        check(p.ladder[i] < p.ladders, "choose_chunks: ladder[", i, "] is ", static_cast<int>(p.ladder[i]),
              ", expected 0 to ", p.ladders - 1);
        lowest += p.cost[p.ladder[i]];
    }
    check(lowest <= p.budget, "choose_chunks: budget is ", p.budget, ", the cheapest steps cost ", lowest);
}

void choose_chunks(const ChooseChunksParams& p, const Where& where) {
    if (where.on_host()) check_items(p);
    where.on_host() ? cpu::choose_chunks(p) : cuda::choose_chunks(p, where);
}

void upload(std::span<const Piece> pieces, const Where& where) {
    if (!where.on_host()) return cuda::upload(pieces, where);
    for (const Piece& p : pieces) std::memcpy(p.to, p.from, static_cast<size_t>(p.bytes));
}

void copy(const Block& b, const Where& where) {
    if (!where.on_host()) return cuda::copy(b, where);
    for (int64_t i = 0; i < b.rows; ++i) {
        std::memcpy(static_cast<unsigned char*>(b.to) + i * b.to_stride,
                    static_cast<const unsigned char*>(b.from) + i * b.from_stride, static_cast<size_t>(b.bytes));
    }
}

void download(void* to, const void* from, int64_t bytes, const Where& where) {
    if (!where.on_host()) return cuda::download(to, from, bytes, where);
    std::memcpy(to, from, static_cast<size_t>(bytes));
}

}  // namespace kvstrata::ops
