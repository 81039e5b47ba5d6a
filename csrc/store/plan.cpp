// apply_plan: the only code that changes the state and the tier of a token. It writes new pages, switches the table, frees
// the old ones. What a plan comes to: repack.h.
//
// Where memory is short, a row is rewritten piece by piece: the changing pages of fewest survivors first, each piece written
// and switched before the next, which finds the pages that it freed. Plans with tiers or groups are applied whole: what goes Far
// takes no Near page but those of the ring, where it is put together.
#include <algorithm>
#include <bit>
#include <cmath>

#include "common/check.h"
#include "common/fault.h"
#include "common/layout.h"
#include "ops/compact.h"
#include "ops/quantize.h"
#include "store/repack.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

constexpr int kCentreTokens = 256;    // fewer stored tokens do not tell a mean
constexpr double kCentreRatio = 2.0;  // of |mean| to standard deviation, from which a channel is centred
constexpr int kDecodedAtOnce = 256;   // pages, where each piece is a wait

// Columns of a plan as they were, to be found by position: a tagged row's table is in the order of its sets. None of others.
struct Reordering {
    struct Planned {
        int32_t position;
        uint8_t state;
        pages::SetTag set;
    };
    std::vector<Planned> planned;
    std::vector<int32_t> now;

    Reordering(const pages::Row& row, const RowPlan& plan, pages::Pools& pools) : now(row.tagged ? row.stored : 0) {
        if (!row.tagged) return;
        pages::positions(row, pools, now.data());
        for (int32_t i = 0; i < row.stored; ++i) {
            planned.push_back({now[i], plan.state[i], plan.set ? plan.set[i] : pages::kBackbone});
        }
        std::sort(planned.begin(), planned.end(),
                  [](const Planned& a, const Planned& b) { return a.position < b.position; });
    }

    void follow(const pages::Row& row, pages::Pools& pools, uint8_t* state, pages::SetTag* set) {
        pages::positions(row, pools, now.data());
        for (int32_t i = 0; i < row.stored; ++i) {
            const auto at = std::lower_bound(planned.begin(), planned.end(), now[i],
                                             [](const Planned& p, int32_t position) { return p.position < position; });
            state[i] = at->state;
            if (set) set[i] = at->set;
        }
    }
};

}  // namespace

// The plan's columns are [B * H, columns]: for every row of the given sequences, in order, of each stored token in table
// order; what is beyond a row's stored tokens is not read. With `protect`, sinks and tail must stay as they are. Bits only
// fall; folded tokens keep their state; the open tail can only be evicted from, and only without `protect`; a Far token stays
// or is evicted.
void Store::check_plan(int layer, std::span<const SeqId> seqs, const PlanColumns& plan, bool protect) {
    check_layer(layer, "apply_plan");
    check_sequences(seqs, "apply_plan");
    const int heads = layers_[layer].kv_heads;
    for (size_t line = 0; line < seqs.size() * heads; ++line) {
        const pages::Row& row = row_of(find(seqs[line / heads], "apply_plan"), layer, static_cast<int>(line % heads));
        check(row.stored <= plan.columns, "apply_plan: state has ", plan.columns, " columns, expected at least the ",
              row.stored, " stored tokens of head ", line % heads);
        check_row_plan(layer, row, static_cast<int64_t>(line), plan, protect);
    }
}

void Store::check_row_plan(int layer, const pages::Row& row, int64_t line, const PlanColumns& plan, bool protect) {
    const RowPlan want = plan.row(line);
    check(!want.set || row.tagged, "apply_plan: set is given, expected none in a cache without sets");
    std::vector<int32_t> pos(row.stored);
    pages::positions(row, pools_, pos.data());
    int i = 0;
    for (int e = 0; e < row.entries(); ++e) {
        const Kind now = kinds_[page_pool(row.page[e])];
        for (uint16_t m = row.alive[e]; m; m &= m - 1, ++i) {
            const int slot = std::countr_zero(m);
            const State next = static_cast<State>(want.state[i]);
            const Tier tier = want.tier ? static_cast<Tier>(want.tier[i]) : now.tier;
            const bool moves = want.group && want.group[i] >= 0;
            if (want.set) check_set(row, e, line, i, want.set[i]);
            if (next == now.state && tier == now.tier && !moves) continue;
            const auto at = [&] { return message("apply_plan: state[", line, ", ", i, "] is ", int{want.state[i]}); };
            check(want.state[i] < kStates && (next == State::evicted || pool_of(layer, next, tier) >= 0), at(),
                  tier == Tier::far ? " in the Far tier" : "",
                  ", expected 0 (Evicted), 1 (Full) or a quantized format of this cache");
            check(next == State::evicted || next >= now.state, at(), ", expected ", static_cast<int>(now.state),
                  " as now, fewer bits or 0 (Evicted)");
            check(now.tier == Tier::near || next == State::evicted || (next == now.state && tier == now.tier), at(),
                  ", which changes a token of the Far tier: expected it as it is, in another group, or 0 (Evicted)");
            check(!protect || (e < row.sealed && pos[i] >= options_.sinks), at(), ", which changes position ", pos[i],
                  ", which is protected (a sink, or in the tail)");
            check(e < row.sealed || next == State::evicted, at(), ", expected 0 or 1 in the open tail");
            check(row.visible[e] >> slot & 1, at(), ", which changes position ", pos[i], ", which is folded");
        }
    }
}

// Pages of the tail are pending, sealed ones of a set.
void Store::check_set(const pages::Row& row, int entry, int64_t line, int i, pages::SetTag to) const {
    const bool open = entry >= row.sealed;
    check(open == (to == pages::kPending) && (open || pages::set_of(to) <= pages::kMaxSet), "apply_plan: set[", line,
          ", ", i, "] is ", to, open ? ", expected 65535 in the open tail" : ", expected a set below 32767");
}

// The largest piece of a row's plan whose new pages cost at most `spare` beside those that are free, cost [pools] each; one
// changing entry at the least. All of a plan with tiers or groups.
PlanPiece Store::plan_piece(int layer, SeqId seq, int head, const RowPlan& plan, std::span<const int64_t> cost,
                            int64_t spare, int64_t room) {
    const pages::Row& row = row_of(find(seq, "plan_piece"), layer, head);
    check(cost.size() == pools_.size(), "plan_piece: cost has ", cost.size(), " elements, expected ", pools_.size());
    PlanPiece piece;
    const auto fits = [&](int most) {
        const Repack r = repack(row, plan, most, recalls(layer) ? first_indexed(row) : 0, pools_, kinds_.data());
        piece = {std::min(most, r.changing), r.changing, std::vector<int64_t>(pools_.size(), 0)};
        for (int tier = 0; tier < kTiers; ++tier) {
            for (int s = 1; s < kStates; ++s) {
                const int64_t n = static_cast<int64_t>(r.pages[tier][s].size());
                if (n) piece.pages[pool_of(layer, static_cast<State>(s), static_cast<Tier>(tier))] += n;
            }
        }
        int64_t bytes = 0, taken = 0;
        for (size_t p = 0; p < pools_.size(); ++p) {
            bytes += std::max<int64_t>(0, piece.pages[p] - pools_[p].free()) * cost[p];
            taken += piece.pages[p] * (kPositionBytes + (info_[p].tier == Tier::near ? info_[p].page_bytes : 0));
        }
        return bytes <= spare && taken <= room;
    };
    if (fits(row.sealed) || plan.whole()) return piece;
    int low = 1, high = std::max(piece.changing, 1);  // `high` does not fit, unless it is 1
    while (high - low > 1) (fits((low + high) / 2) ? low : high) = (low + high) / 2;
    fits(low);
    return piece;
}

// The new pages of a row's plan while they are written: all of them are released again if the plan fails.
struct Store::Writing {
    Store& store;
    Sequence& sequence;
    int layer, head;
    Centre centre_before;
    std::vector<pages::Fresh> fresh;
    Index summaries;  // of the fresh pages, in their order

    Writing(Store& s, Sequence& q, int l, int h)
        : store(s), sequence(q), layer(l), head(h), summaries(s.layers_[l].head_dim, s.options_.recall.kind) {
        if (!q.centres.empty()) centre_before = q.centres[s.first_row_[l] + h];
    }
    void undo() {
        for (const pages::Fresh& f : fresh) pages::pool_of(store.pools_, f.page).release(f.page);
        if (!sequence.centres.empty()) sequence.centres[store.first_row_[layer] + head] = centre_before;
    }

    // Pages of one kind: into Near pages at once, into Far ones a ring of them at a time.
    void write(const Repack& r, int tier, int state) {
        const auto& pages = r.pages[tier][state];
        if (pages.empty()) return;
        const int pool = store.pool_of(layer, static_cast<State>(state), static_cast<Tier>(tier));
        // Far pages are put together in the ring but for its last page, where those that they come from are read.
        const size_t ring = tier ? store.ring_of(pool).size() - 1 : pages.size();
        for (size_t first = 0; first < pages.size(); first += ring) {
            const std::span<const NewPage> batch(pages.data() + first, std::min(ring, pages.size() - first));
            write_batch(r.to[tier][state], batch, static_cast<State>(state), static_cast<Tier>(tier), pool);
        }
    }

    void write_batch(const std::vector<Survivor>& from, std::span<const NewPage> batch, State state, Tier tier,
                     int pool) {
        std::vector<ops::Move> copies, encodes, fetches;
        bool centred = false;
        const size_t first = fresh.size();
        for (size_t b = 0; b < batch.size(); ++b) {
            const PageId page = store.pools_[pool].take(sequence.owner);
            fresh.push_back({page, 0, batch[b].want, {}, batch[b].set});
            const PageId to = tier == Tier::far ? store.ring_of(pool)[b] : page;
            for (int slot = 0; slot < batch[b].count; ++slot) {
                const Survivor& t = from[batch[b].first + slot];
                fresh.back().alive |= static_cast<uint16_t>(1u << slot);
                fresh.back().note[slot] = t.note;
                const bool same = t.now == state;
                auto& moves = store.far(t.page) ? fetches : same ? copies : encodes;
                moves.push_back({t.page, t.slot, to, slot});
                centred |= !same && t.now == State::full;
            }
        }
        if (centred && store.options_.centred) store.freeze_centre(sequence, layer, head);
        move(copies, encodes);
        fetch(fetches);
        const std::span<const pages::Fresh> written(fresh.data() + first, batch.size());
        if (store.recalls(layer)) {
            store.summarize(sequence, layer, head, written, tier == Tier::far ? &store.ring_of(pool) : nullptr,
                            summaries);
        }
        for (size_t b = 0; tier == Tier::far && b < batch.size(); ++b) {
            store.write_far(written[b].page, store.ring_of(pool)[b]);
        }
    }

    // Tokens of Far pages, page by page.
    void fetch(std::vector<ops::Move>& moves) const {
        std::stable_sort(moves.begin(), moves.end(),
                         [](const ops::Move& a, const ops::Move& b) { return a.from < b.from; });
        for (size_t first = 0, end; first < moves.size(); first = end) {
            const PageId page = moves[first].from, stage = store.ring_of(page_pool(page)).back();
            store.read_far(page, stage);
            for (end = first; end < moves.size() && moves[end].from == page; ++end) moves[end].from = stage;
            move({moves.begin() + static_cast<int64_t>(first), moves.begin() + static_cast<int64_t>(end)}, {});
        }
    }

    void move(const std::vector<ops::Move>& copies, const std::vector<ops::Move>& encodes) const {
        const float* const mean = store.centre(sequence, layer, head);
        const std::vector<int32_t> rows(mean ? encodes.size() : 0, 0);
        std::span<const ops::Move> copied(copies), encoded(encodes);
        const int32_t* row_of = mean ? rows.data() : nullptr;
        if (store.mirror_.on()) {
            for (const ops::Move& m : copies) move_position(m);
            for (const ops::Move& m : encodes) move_position(m);
            const std::span<const int32_t> all(rows);
            store.mirror_.begin_lists(Mirror::list_bytes(copied) + Mirror::list_bytes(encoded) +
                                      Mirror::list_bytes(all));
            copied = {store.mirror_.list(copied), copies.size()};
            encoded = {store.mirror_.list(encoded), encodes.size()};
            if (mean) row_of = store.mirror_.list(all);
        }
        PoolView pools[kMaxPools];
        store.views(pools);
        const int dim = store.layers_[layer].head_dim;
        const auto n = [](auto list) { return static_cast<int32_t>(list.size()); };
        const Where& where = store.mirror_.where;
        ops::compact({copied.data(), n(copied), dim, pools, store.threads_}, where);
        if (encodes.empty()) return;
        ops::quantize({encoded.data(), mean, row_of, n(encoded), dim, pools, store.threads_}, where);
    }

    // In the books; the op does it where the payload is.
    void move_position(const ops::Move& m) const {
        pages::pool_of(store.pools_, m.to).positions(m.to)[m.to_slot] =
            pages::pool_of(store.pools_, m.from).positions(m.from)[m.from_slot];
    }
};

// A piece of one row's plan, all or nothing: at most `most` of its changing entries. Its new pages must be free: plan_piece
// says how many. Then `state` and `set`, if given, are put into the order of the table as it stands. Returns whether anything
// is left to change.
bool Store::apply_plan(int layer, SeqId seq, int head, const RowPlan& plan, uint8_t* state, pages::SetTag* set,
                       int most) {
    Sequence& s = find(seq, "apply_plan");
    pages::Row& row = row_of(s, layer, head);
    if (plan.whole()) most = row.sealed;
    const Repack r = repack(row, plan, most, recalls(layer) ? first_indexed(row) : 0, pools_, kinds_.data());
    if (!r.changes) return false;
    fault::hit("plan.after_check");
    if (recalls(layer)) summarize_sealed(s, layer, head);
    std::vector<uint8_t> left;
    Reordering columns(row, plan, pools_);
    Writing writing(*this, s, layer, head);
    try {
        if (!row.tagged) left = reordered(row, plan, r);
        for (int tier = 0; tier < kTiers; ++tier) {
            for (int to = 1; to < kStates; ++to) writing.write(r, tier, to);
        }
        fault::hit("plan.after_write");
    } catch (...) {
        writing.undo();
        throw;
    }
    if (recalls(layer)) join_index(s, layer, head, r, writing.summaries);
    const int32_t before = row.stored;
    if (row.tagged) pages::tag(row, r.tag);
    pages::replace(row, r.keep, writing.fresh, pools_);
    pages::arrange(row, s.view);
    if (row.tagged) columns.follow(row, pools_, state, set);
    if (recalls(layer)) summarize_groups(s, layer, head);
    std::copy(left.begin(), left.end(), state);
    if (row.stored != before) s.floor = std::max(s.floor, base(s, seen(layer, s)));
    return r.changing > most;
}

const float* Store::centre(const Sequence& s, int layer, int head) const {
    if (s.centres.empty()) return nullptr;
    const Centre& c = s.centres[first_row_[layer] + head];
    return mirror_.on() ? c.on_device : c.mean ? c.mean->data() : nullptr;
}

// Channels whose keys stand off zero, over the row's stored full tokens: their mean; the others, or all of a short row: 0.
void Store::freeze_centre(Sequence& s, int layer, int head) {
    Centre& centre = s.centres[first_row_[layer] + head];
    if (centre.frozen) return;
    const pages::Row& row = row_of(s, layer, head);
    const int dim = layers_[layer].head_dim;
    const size_t vectors = static_cast<size_t>(kSlots) * dim;
    const int each = mirror_.on() ? kDecodedAtOnce : 1;  // the host waits for what it reads of a device
    std::vector<float> k, v;
    std::vector<double> sum(dim, 0.0), squares(dim, 0.0);
    std::vector<PageId> full;
    std::vector<uint16_t> alive;
    int64_t n = 0;
    for (int e = 0; e < row.entries(); ++e) {
        if (kinds_[page_pool(row.page[e])] != Kind{State::full, Tier::near}) continue;
        full.push_back(row.page[e]);
        alive.push_back(row.alive[e]);
    }
    for (size_t first = 0; first < full.size(); first += each) {
        const size_t pages = std::min<size_t>(each, full.size() - first);
        k.resize(pages * vectors), v.resize(k.size());
        decode({&full[first], pages}, nullptr, dim, k.data(), v.data());
        for (size_t i = 0; i < pages; ++i) {
            for (uint16_t m = alive[first + i]; m; m &= m - 1, ++n) {
                const float* key = &k[i * vectors + static_cast<size_t>(std::countr_zero(m)) * dim];
                for (int d = 0; d < dim; ++d) {
                    sum[d] += key[d];
                    squares[d] += static_cast<double>(key[d]) * key[d];
                }
            }
        }
    }
    std::vector<float> mean(dim, 0.0f);
    bool any = false;
    for (int d = 0; n >= kCentreTokens && d < dim; ++d) {
        const double m = sum[d] / n, deviation = std::sqrt(std::max(0.0, squares[d] / n - m * m));
        if (std::isfinite(m) && std::abs(m) >= kCentreRatio * deviation && m != 0.0) {
            mean[d] = static_cast<float>(m);
            any = true;
        }
    }
    centre.frozen = true;
    if (!any) return;
    centre.mean = std::make_shared<const std::vector<float>>(std::move(mean));
    if (mirror_.on()) centre.on_device = mirror_.constant(*centre.mean);
}

}  // namespace kvstrata::store
