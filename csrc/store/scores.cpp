// What scorers read of a store's rows: window votes, pooled scores, keys, statistics, each op over the rows of one layer.
//
// Ops work on slots, [M, 16] of each row; policies on stored tokens in table order, [N]. Here one becomes the other.
#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>

#include "common/check.h"
#include "common/layout.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

// Alive slots of [M, 16] to the front of a line of `columns`, the rest zeros.
void compact(const pages::Row& row, const float* slots, float* out, int64_t columns) {
    float* const end = out + columns;
    for (int e = 0; e < row.entries(); ++e) {
        for (uint16_t m = row.alive[e]; m; m &= m - 1) *out++ = slots[e * kSlots + std::countr_zero(m)];
    }
    std::fill(out, end, 0.0f);
}

void expand(const pages::Row& row, const float* line, float* slots) {
    for (int e = 0; e < row.entries(); ++e) {
        for (uint16_t m = row.alive[e]; m; m &= m - 1) slots[e * kSlots + std::countr_zero(m)] = *line++;
    }
}

// Adds softmax(x) * by to out, [n].
void add_shares(const float* x, int n, float by, float* out) {
    const float most = n ? *std::max_element(x, x + n) : 0.0f;
    if (n == 0 || std::isinf(most)) return;
    double total = 0.0;
    for (int e = 0; e < n; ++e) total += std::exp(x[e] - most);
    for (int e = 0; e < n; ++e) out[e] += by * std::exp(x[e] - most) / static_cast<float>(total);
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Memory of one call of an op, where it runs: its parts one after another.
class Room {
  public:
    Room(Mirror& mirror, int64_t bytes) : mirror_(mirror) {
        if (mirror.on()) {
            next_ = mirror.workspace(bytes);
            return;
        }
        own_ = std::make_unique_for_overwrite<unsigned char[]>(static_cast<size_t>(bytes) + 64);
        next_ = own_.get() + (64 - reinterpret_cast<uintptr_t>(own_.get()) % 64) % 64;
    }
    template <class T = unsigned char>
    T* part(int64_t n) {
        unsigned char* const at = next_;
        next_ += aligned(n * int64_t{sizeof(T)});
        return reinterpret_cast<T*>(at);
    }
    // Floats of a part, on the CPU. The op has been called.
    const float* found(const float* there, int64_t n) {
        if (!mirror_.on()) return there;
        here_.resize(static_cast<size_t>(n));
        ops::download(here_.data(), there, n * int64_t{sizeof(float)}, mirror_.where);
        return here_.data();
    }

  private:
    Mirror& mirror_;
    std::unique_ptr<unsigned char[]> own_;  // not a vector: it would be zeroed first
    unsigned char* next_ = nullptr;
    std::vector<float> here_;
};

}  // namespace

// The rows of some sequences in one layer, with the last of their queries.
struct Store::Scored {
    std::vector<const pages::Row*> rows;        // [R]
    std::vector<ops::WindowRow> windows;        // [R]
    std::vector<std::vector<unsigned char>> q;  // per sequence
    std::vector<std::vector<int32_t>> q_pos;    // per sequence
    int most = 0;                               // entries of the longest row
};

// reads: their keys are to be read, none of which may be Far.
Store::Scored Store::scored(int layer, std::span<const SeqId> seqs, int queries, const char* verb, bool reads) {
    check_layer(layer, verb);
    const LayerShape& shape = layers_[layer];
    const int64_t group = shape.q_heads / shape.kv_heads;
    const int64_t vector = static_cast<int64_t>(shape.head_dim) * dtype_bytes(options_.dtype);
    Scored s;
    if (mirror_.on()) {
        const int64_t one = Mirror::list_bytes(options_.queries * shape.q_heads * vector);
        mirror_.begin_lists(static_cast<int64_t>(seqs.size()) * (one + Mirror::list_bytes(4 * options_.queries)));
    }
    s.q_pos.reserve(seqs.size());  // what is listed for a device stays where it is
    for (SeqId id : seqs) {
        Sequence& sequence = find(id, verb);
        const QueryRing last = queries > 0 ? last_queries(layer, id) : QueryRing();
        const int count = last.count();
        const int64_t bytes = count * shape.q_heads * vector;
        s.q.emplace_back(mirror_.on() ? 0 : bytes);
        unsigned char* const q = mirror_.on() ? mirror_.space(bytes) : s.q.back().data();
        if (count > 0) last.gather(q);
        int64_t end = sequence.length;
        for (const StepSequence& t : step_) {
            if (open_ && t.sequence == &sequence && done_[layer] > 0) end += t.count;
        }
        const int n = std::min(count, queries);
        std::vector<int32_t>& at = s.q_pos.emplace_back(n);
        for (int t = 0; t < n; ++t) at[t] = static_cast<int32_t>(end - n + t);
        const int32_t* const q_pos = mirror_.on() ? mirror_.list(std::span<const int32_t>(at)) : at.data();
        for (int h = 0; h < shape.kv_heads; ++h) {
            pages::Row& row = row_of(sequence, layer, h);
            const bool away = std::any_of(row.page.begin(), row.page.end(), [this](PageId page) { return far(page); });
            if (away && reads)
                throw Unsupported(message(verb, ": layer ", layer, " has tokens in the Far tier, expected none"));
            s.rows.push_back(&row);
            s.most = std::max(s.most, row.entries());
            const PageId* const pages = mirror_.pages(row);
            const uint16_t* const visible = mirror_.visible(row);
            s.windows.push_back({q + (h * group * count + count - n) * vector, shape.head_dim,
                                 int64_t{count} * shape.head_dim, nullptr, q_pos, pages, visible,
                                 centre(sequence, layer, h), nullptr, row.entries(), n});
        }
    }
    return s;
}

void Store::fill(ops::WindowParams& p, const Scored& s, int layer, const Arithmetic& a, const PoolView* pools) const {
    p.rows = s.windows.data();
    p.n_rows = static_cast<int32_t>(s.windows.size());
    p.group = layers_[layer].q_heads / layers_[layer].kv_heads;
    p.head_dim = layers_[layer].head_dim;
    p.q_dtype = options_.dtype;
    p.pools = pools;
    p.scale = a.scale;
    p.softcap = a.softcap;
    p.window = 0;
    p.threads = threads_;
}

void Store::score_window(int layer, std::span<const SeqId> seqs, int queries, ops::Spread spread, float weight,
                         const Arithmetic& arithmetic, float* out, int64_t columns) {
    const Scored s = scored(layer, seqs, queries, "score_window");
    PoolView pools[kMaxPools];
    views(pools);
    ops::ScoreWindowParams p{};
    fill(p, s, layer, arithmetic, pools);
    const int64_t line = static_cast<int64_t>(s.most) * kSlots, heads = static_cast<int64_t>(s.rows.size()) * p.group;
    const int64_t slots = heads * line, lses = heads * std::max(queries, 1);
    const int64_t bytes = ops::score_window_workspace_bytes(p, mirror_.where);
    Room room(mirror_, aligned(4 * slots) + aligned(4 * lses) + aligned(bytes));
    p.spread = spread;
    p.weight = weight;
    p.score = room.part<float>(slots);
    p.score_stride_r = p.group * line;
    p.score_stride_g = line;
    p.lse = room.part<float>(lses);
    p.lse_stride_r = int64_t{p.group} * std::max(queries, 1);
    p.lse_stride_g = std::max(queries, 1);
    p.workspace = room.part(bytes);
    ops::score_window(p, mirror_.where);
    const float* const found = room.found(p.score, slots);
    for (int64_t r = 0; r < heads; ++r) compact(*s.rows[r / p.group], found + r * line, out + r * columns, columns);
}

void Store::score_max(int layer, std::span<const SeqId> seqs, const SpanQueries& queries, const Arithmetic& arithmetic,
                      float* out, int64_t columns) {
    Scored s = scored(layer, seqs, 0, "score_max");
    PoolView pools[kMaxPools];
    views(pools);
    ops::ScoreMaxParams p{};
    fill(p, s, layer, arithmetic, pools);
    const int64_t line = static_cast<int64_t>(s.most) * kSlots, group = p.group, rows = p.n_rows;
    for (int64_t r = 0; r < rows; ++r) {
        ops::WindowRow& row = s.windows[r];
        row.q = static_cast<const char*>(queries.q) + r * queries.row * dtype_bytes(queries.dtype);
        row.q_stride_t = queries.token, row.q_stride_g = queries.head;
    }
    p.q_dtype = queries.dtype;
    p.queries = queries.count;
    p.spans = queries.spans.data();
    p.n_spans = static_cast<int32_t>(queries.spans.size()) - 1;
    p.lse = queries.lse;
    p.lse_stride_r = group * queries.count, p.lse_stride_g = queries.count;
    const int64_t slots = p.n_spans * rows * line, bytes = ops::score_max_workspace_bytes(p);
    Room room(mirror_, aligned(4 * slots) + aligned(bytes));
    p.out = room.part<float>(slots);
    p.out_stride_e = rows * line, p.out_stride_r = line;
    p.workspace = room.part(bytes);
    ops::score_max(p);
    for (int64_t i = 0; i < p.n_spans * rows; ++i) {
        compact(*s.rows[i % rows], p.out + i * line, out + i * columns, columns);
    }
}

void Store::measure(int layer, std::span<const SeqId> seqs, int queries, ops::Stats which, const Arithmetic& arithmetic,
                    float* out) {
    const Scored s = scored(layer, seqs, queries, "measure");
    PoolView pools[kMaxPools];
    views(pools);
    ops::MeasureParams p{};
    fill(p, s, layer, arithmetic, pools);
    p.which = which;
    p.skip = options_.sinks;
    const int64_t stats = int64_t{p.n_rows} * p.group * 3, bytes = ops::measure_workspace_bytes(p, mirror_.where);
    Room room(mirror_, aligned(4 * stats) + aligned(bytes));
    p.stats = room.part<float>(stats);
    p.workspace = room.part(bytes);
    ops::measure(p, mirror_.where);
    std::copy_n(room.found(p.stats, stats), stats, out);
}

void Store::score_keys(int layer, std::span<const SeqId> seqs, ops::KeyScore kind, float* out, int64_t columns) {
    const Scored s = scored(layer, seqs, 0, "score_keys");
    PoolView pools[kMaxPools];
    views(pools);
    const int64_t line = static_cast<int64_t>(s.most) * kSlots;
    const int64_t slots = static_cast<int64_t>(s.rows.size()) * line;
    std::vector<ops::KeysRow> rows;
    for (const ops::WindowRow& w : s.windows) rows.push_back({w.pages, w.visible, w.centre, nullptr, w.entries});
    ops::ScoreKeysParams p{
        rows.data(), static_cast<int32_t>(rows.size()), layers_[layer].head_dim, kind, pools, nullptr, threads_};
    const int64_t bytes = ops::score_keys_workspace_bytes(p, mirror_.where);
    Room room(mirror_, aligned(4 * slots) + aligned(bytes));
    float* const scores = room.part<float>(slots);
    for (size_t r = 0; r < rows.size(); ++r) rows[r].score = scores + r * line;
    p.workspace = room.part(bytes);
    ops::score_keys(p, mirror_.where);
    const float* const found = room.found(scores, slots);
    for (size_t r = 0; r < s.rows.size(); ++r) compact(*s.rows[r], found + r * line, out + r * columns, columns);
}

void Store::score_pages(int layer, std::span<const SeqId> seqs, int queries, const Arithmetic& arithmetic, float* out,
                        int64_t columns) {
    check(recalls(layer), "score_pages: layer ", layer, " has no summaries, expected one that is selected from");
    const Scored s = scored(layer, seqs, queries, "score_pages", false);
    std::vector<float> mass(s.rows.size() * s.most, 0.0f);
    for (int t = 0; t < queries; ++t) add_votes(layer, seqs, s, t, arithmetic, mass.data());
    for (size_t r = 0; r < s.rows.size(); ++r) {
        float* to = out + static_cast<int64_t>(r) * columns;
        for (int e = 0; e < s.rows[r]->entries(); ++e) {
            const int slots = std::popcount(s.rows[r]->alive[e]);
            to = std::fill_n(to, slots, mass[r * s.most + e] / static_cast<float>(slots));
        }
        std::fill(to, out + static_cast<int64_t>(r + 1) * columns, 0.0f);
    }
}

// Query t of every row that has so many: a selection that selects nothing. mass [R, M].
void Store::add_votes(int layer, std::span<const SeqId> seqs, const Scored& s, int t, const Arithmetic& arithmetic,
                      float* mass) {
    const LayerShape& shape = layers_[layer];
    const int group = shape.q_heads / shape.kv_heads;
    std::vector<float> x(s.rows.size() * group * s.most);
    std::vector<ops::SelectRow> rows;
    std::vector<size_t> of;
    for (size_t r = 0; r < s.rows.size(); ++r) {
        const ops::WindowRow& w = s.windows[r];
        if (t >= w.queries) continue;
        const Index& index = sequence(seqs[r / shape.kv_heads]).indices[first_row_[layer] + r % shape.kv_heads];
        ops::SelectRow& row = rows.emplace_back();
        row.q = static_cast<const unsigned char*>(w.q) + t * w.q_stride_t * dtype_bytes(options_.dtype);
        row.q_stride_g = w.q_stride_g;
        row.blocks = index.blocks();
        row.visible = s.rows[r]->visible.data();
        row.first = first_indexed(*s.rows[r]);
        row.entries = index.count();
        row.x = &x[r * group * s.most];
        of.push_back(r);
    }
    if (rows.empty()) return;
    ops::SelectParams p{rows.data(),
                        static_cast<int32_t>(rows.size()),
                        group,
                        shape.head_dim,
                        options_.dtype,
                        arithmetic.scale,
                        options_.recall.weight,
                        ops::Aggregate::sum,
                        nullptr,
                        threads_,
                        options_.recall.kind,
                        arithmetic.softcap};
    Room room(mirror_, ops::select_workspace_bytes(p));
    p.workspace = room.part(0);
    ops::score_pages(p);
    for (size_t i = 0; i < rows.size(); ++i) {
        const int n = rows[i].entries;
        const float by = 1.0f / static_cast<float>(group * s.windows[of[i]].queries);
        for (int g = 0; g < group; ++g) add_shares(rows[i].x + int64_t{g} * n, n, by, mass + of[i] * s.most);
    }
}

// score f32 [R, G, N] -> out f32 [R, N].
void Store::pool_scores(int layer, std::span<const SeqId> seqs, const float* score, int group, int64_t columns,
                        int kernel, ops::PoolKind kind, ops::PoolDivide divide, float* out) {
    check(group >= 1, "pool_scores: group is ", group, ", expected >= 1");
    const Scored s = scored(layer, seqs, 0, "pool_scores");
    PoolView pools[kMaxPools];
    views(pools);
    const int64_t line = static_cast<int64_t>(s.most) * kSlots;
    std::vector<float> slots(s.rows.size() * group * line);
    std::vector<ops::PoolRow> rows;
    for (size_t r = 0; r < s.rows.size(); ++r) {
        for (int g = 0; g < group; ++g) {
            expand(*s.rows[r], score + (r * group + g) * columns, &slots[(r * group + g) * line]);
        }
        const ops::WindowRow& w = s.windows[r];
        rows.push_back({nullptr, line, w.pages, w.visible, nullptr, w.entries});
    }
    ops::PoolParams p{rows.data(), static_cast<int32_t>(rows.size()), group, kernel, kind, divide, pools, nullptr,
                      threads_};
    const auto given = static_cast<int64_t>(slots.size());
    const int64_t pooled = given / group, bytes = ops::pool_workspace_bytes(p, mirror_.where);
    Room room(mirror_, aligned(4 * given) + aligned(4 * pooled) + aligned(bytes));
    float *const from = room.part<float>(given), *const to = room.part<float>(pooled);
    const ops::Piece piece{from, slots.data(), 4 * given};
    ops::upload({&piece, 1}, mirror_.where);
    for (size_t r = 0; r < rows.size(); ++r) rows[r].score = from + r * group * line, rows[r].out = to + r * line;
    p.workspace = room.part(bytes);
    ops::pool(p, mirror_.where);
    const float* const found = room.found(to, pooled);
    for (size_t r = 0; r < s.rows.size(); ++r) compact(*s.rows[r], found + r * line, out + r * columns, columns);
}

}  // namespace kvstrata::store
