// apply_plan: the only code that changes the state of a token. It writes new pages, switches the table, frees the old ones.
//
// Survivors of touched pages are packed by (format, position) into new pages. A page is touched if one of its tokens
// changes state, or if it is part-filled and others of its format are packed anyway: so a row never holds two part-filled
// sealed pages of one format after a plan that moves anything.
//
// Where memory is short, a row is rewritten piece by piece: the changing pages of fewest survivors first, each piece written
// and switched before the next, which finds the pages that it freed.
#include <algorithm>
#include <bit>
#include <cmath>

#include "common/check.h"
#include "common/fault.h"
#include "common/layout.h"
#include "ops/compact.h"
#include "ops/quantize.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

constexpr int kCentreTokens = 256;    // fewer stored tokens do not tell a mean
constexpr double kCentreRatio = 2.0;  // of |mean| to standard deviation, from which a channel is centred

struct Survivor {
    int32_t position;
    PageId page;
    int32_t slot;
    State now;
    uint32_t note;
};

// What a piece of a row's plan comes to: entries that leave, survivors to pack by their new state, masks of the tail.
struct Repack {
    std::vector<uint8_t> gone;          // [sealed entries]
    std::vector<uint16_t> tail_keep;    // [tail entries]
    std::vector<Survivor> to[kStates];  // by new state, in order of position
    std::vector<const uint8_t*> wants;  // [entries] the new states of each entry's tokens
    int changing = 0;                   // sealed entries that the whole plan changes
    bool changes = false;

    int64_t pages(int state) const { return (static_cast<int64_t>(to[state].size()) + kSlots - 1) / kSlots; }
};

bool holds(const pages::Row& row, int entry, State now, const uint8_t* want) {
    for (int i = 0; i < std::popcount(row.alive[entry]); ++i) {
        if (want[i] != static_cast<uint8_t>(now)) return false;
    }
    return true;
}

// Those of the sealed entries that change, at most `most`: of more, those of fewest survivors.
template <class StateOf>
std::vector<int> changing(const pages::Row& row, Repack& r, int most, StateOf state_of) {
    std::vector<int> found;
    for (int e = 0; e < row.sealed; ++e) {
        if (!holds(row, e, state_of(row.page[e]), r.wants[e])) found.push_back(e);
    }
    r.changing = static_cast<int>(found.size());
    if (r.changing <= most) return found;
    std::vector<int> left(row.sealed);
    for (int e : found) {
        const uint8_t* want = r.wants[e];
        left[e] =
            static_cast<int>(std::count_if(want, want + std::popcount(row.alive[e]), [](uint8_t w) { return w; }));
    }
    std::stable_sort(found.begin(), found.end(), [&](int a, int b) { return left[a] < left[b]; });
    found.resize(most);
    return found;
}

// Survivors of one entry, each to the state it shall take.
void collect(const pages::Row& row, int e, State now, const int32_t* positions, Repack& r) {
    int i = 0;
    for (uint16_t m = row.alive[e]; m; m &= m - 1, ++i) {
        const uint8_t want = r.wants[e][i];
        if (!want) continue;
        const int slot = std::countr_zero(m);
        const uint32_t note = row.noted ? row.note[static_cast<size_t>(e) * kSlots + slot] : 0;
        r.to[want].push_back({positions[slot], row.page[e], slot, now, note});
    }
}

// A piece of at most `most` changing entries.
template <class StateOf>
Repack repack(const pages::Row& row, const uint8_t* want, int most, pages::Pools& pools, StateOf state_of) {
    Repack r;
    r.gone.assign(row.sealed, 0);
    for (int e = 0; e < row.entries(); want += std::popcount(row.alive[e]), ++e) r.wants.push_back(want);
    bool packs[kStates] = {};
    for (int e : changing(row, r, most, state_of)) {
        r.gone[e] = 1;
        for (int i = 0; i < std::popcount(row.alive[e]); ++i) packs[r.wants[e][i]] = true;
    }
    for (int e = 0; e < row.sealed; ++e) {
        const State now = state_of(row.page[e]);
        const bool part = row.alive[e] != kAllSlots && packs[static_cast<int>(now)];
        if (part && holds(row, e, now, r.wants[e])) r.gone[e] = 1;
        if (!r.gone[e]) continue;
        r.changes = true;
        collect(row, e, now, pool_of(pools, row.page[e]).positions(row.page[e]), r);
    }
    for (int e = row.sealed; e < row.entries(); ++e) {
        uint16_t keep = row.alive[e];
        int i = 0;
        for (uint16_t m = row.alive[e]; m; m &= m - 1, ++i) {
            if (!r.wants[e][i]) keep &= static_cast<uint16_t>(~(1u << std::countr_zero(m)));
        }
        r.changes |= keep != row.alive[e];
        r.tail_keep.push_back(keep);
    }
    for (auto& survivors : r.to) {
        std::sort(survivors.begin(), survivors.end(),
                  [](const Survivor& a, const Survivor& b) { return a.position < b.position; });
    }
    return r;
}

// The new states in the order in which the row's table stands once the piece is done.
std::vector<uint8_t> reordered(const pages::Row& row, const Repack& r) {
    std::vector<uint8_t> out;
    out.reserve(row.stored);
    const auto keep = [&](int e) { out.insert(out.end(), r.wants[e], r.wants[e] + std::popcount(row.alive[e])); };
    for (int e = 0; e < row.sealed; ++e) {
        if (!r.gone[e]) keep(e);
    }
    for (int s = 1; s < kStates; ++s) out.insert(out.end(), r.to[s].size(), static_cast<uint8_t>(s));
    for (int e = row.sealed; e < row.entries(); ++e) {
        for (int i = 0; i < std::popcount(row.alive[e]); ++i) {
            if (r.wants[e][i]) out.push_back(r.wants[e][i]);
        }
    }
    return out;
}

}  // namespace

// state u8 [B * H, columns]: for every row of the given sequences, in order, the State of each stored token in table
// order; columns beyond a row's stored tokens are not read. With `protect`, sinks and tail must stay as they are. Bits
// only fall; folded tokens keep their state; the open tail can only be evicted from, and only without `protect`.
void Store::check_plan(int layer, std::span<const SeqId> seqs, const uint8_t* state, int64_t columns, bool protect) {
    check_layer(layer, "apply_plan");
    check_sequences(seqs, "apply_plan");
    const int heads = layers_[layer].kv_heads;
    std::vector<int32_t> pos;
    for (size_t line = 0; line < seqs.size() * heads; ++line) {
        const pages::Row& row = row_of(find(seqs[line / heads], "apply_plan"), layer, static_cast<int>(line % heads));
        check(row.stored <= columns, "apply_plan: state has ", columns, " columns, expected at least the ", row.stored,
              " stored tokens of head ", line % heads);
        const uint8_t* want = state + line * columns;
        pos.resize(row.stored);
        pages::positions(row, pools_, pos.data());
        int i = 0;
        for (int e = 0; e < row.entries(); ++e) {
            const State now = state_of(row.page[e]);
            for (uint16_t m = row.alive[e]; m; m &= m - 1, ++i) {
                const int slot = std::countr_zero(m);
                if (want[i] == static_cast<uint8_t>(now)) continue;
                const auto at = [&] { return message("apply_plan: state[", line, ", ", i, "] is ", int{want[i]}); };
                const State next = static_cast<State>(want[i]);
                check(want[i] < kStates && (want[i] == 0 || pool_of(layer, next) >= 0), at(),
                      ", expected 0 (Evicted), 1 (Full) or a quantized format of this cache");
                check(want[i] == 0 || next > now, at(), ", expected ", static_cast<int>(now),
                      " as now, fewer bits or 0 (Evicted)");
                check(!protect || (e < row.sealed && pos[i] >= options_.sinks), at(), ", which changes position ",
                      pos[i], ", which is protected (a sink, or in the tail)");
                check(e < row.sealed || want[i] == 0, at(), ", expected 0 or 1 in the open tail");
                check(row.visible[e] >> slot & 1, at(), ", which changes position ", pos[i], ", which is folded");
            }
        }
    }
}

// The largest piece of a row's plan whose new pages cost at most `spare` beside those that are free, cost [pools] each; one
// changing entry at the least.
PlanPiece Store::plan_piece(int layer, SeqId seq, int head, const uint8_t* state, std::span<const int64_t> cost,
                            int64_t spare) {
    const pages::Row& row = row_of(find(seq, "plan_piece"), layer, head);
    check(cost.size() == pools_.size(), "plan_piece: cost has ", cost.size(), " elements, expected ", pools_.size());
    PlanPiece piece;
    const auto fits = [&](int most) {
        const Repack r = repack(row, state, most, pools_, [this](PageId id) { return state_of(id); });
        piece = {std::min(most, r.changing), r.changing, std::vector<int64_t>(pools_.size(), 0)};
        for (int s = 1; s < kStates; ++s) {
            if (r.pages(s)) piece.pages[pool_of(layer, static_cast<State>(s))] += r.pages(s);
        }
        int64_t bytes = 0;
        for (size_t p = 0; p < pools_.size(); ++p) {
            bytes += std::max<int64_t>(0, piece.pages[p] - pools_[p].free()) * cost[p];
        }
        return bytes <= spare;
    };
    if (fits(row.sealed)) return piece;
    int low = 1, high = std::max(piece.changing, 1);  // `high` does not fit, unless it is 1
    while (high - low > 1) (fits((low + high) / 2) ? low : high) = (low + high) / 2;
    fits(low);
    return piece;
}

// A piece of one row's plan, all or nothing: at most `most` of its changing entries. Its new pages must be free: plan_piece
// says how many. Then `state` is put into the order of the table as it stands. Returns whether anything is left to change.
bool Store::apply_plan(int layer, SeqId seq, int head, uint8_t* state, int most) {
    Sequence& s = find(seq, "apply_plan");
    pages::Row& row = row_of(s, layer, head);
    const Repack r = repack(row, state, most, pools_, [this](PageId id) { return state_of(id); });
    if (!r.changes) return false;
    fault::hit("plan.after_check");
    std::vector<pages::Fresh> fresh;
    std::vector<ops::Move> copies, encodes;
    std::vector<uint8_t> left;
    const Centre centre_before = s.centres.empty() ? Centre{} : s.centres[first_row_[layer] + head];
    try {
        left = reordered(row, r);
        bool centred = false;
        for (int to = 1; to < kStates; ++to) {
            for (size_t i = 0; i < r.to[to].size(); ++i) {
                const Survivor& t = r.to[to][i];
                const int slot = static_cast<int>(i % kSlots);
                if (slot == 0) fresh.push_back({pools_[pool_of(layer, static_cast<State>(to))].take(), 0, {}});
                pages::Fresh& f = fresh.back();
                f.alive |= static_cast<uint16_t>(1u << slot);
                f.note[slot] = t.note;
                const bool same = static_cast<int>(t.now) == to;
                (same ? copies : encodes).push_back({t.page, t.slot, f.page, slot});
                centred |= !same && t.now == State::full;
            }
        }
        if (centred) freeze_centre(s, layer, head);
        PoolView pools[kMaxPools];
        views(pools);
        const int dim = layers_[layer].head_dim;
        ops::compact({copies.data(), static_cast<int32_t>(copies.size()), dim, pools, threads_});
        if (!encodes.empty()) {
            const float* const mean = centre(s, layer, head);
            const std::vector<int32_t> first(mean ? encodes.size() : 0, 0);
            ops::quantize({encodes.data(), mean, mean ? first.data() : nullptr, static_cast<int32_t>(encodes.size()),
                           dim, pools, threads_});
        }
        fault::hit("plan.after_write");
    } catch (...) {
        for (const pages::Fresh& f : fresh) pages::pool_of(pools_, f.page).release(f.page);
        if (!s.centres.empty()) s.centres[first_row_[layer] + head] = centre_before;
        throw;
    }
    const int32_t before = row.stored;
    pages::replace(row, r.gone, fresh, r.tail_keep, pools_);
    std::copy(left.begin(), left.end(), state);
    if (row.stored != before) s.floor = std::max(s.floor, base(s, seen(layer, s)));
    return r.changing > most;
}

const float* Store::centre(const Sequence& s, int layer, int head) const {
    if (s.centres.empty()) return nullptr;
    const Centre& c = s.centres[first_row_[layer] + head];
    return c.mean ? c.mean->data() : nullptr;
}

// Channels whose keys stand off zero, over the row's stored full tokens: their mean; the others, or all of a short row: 0.
void Store::freeze_centre(Sequence& s, int layer, int head) {
    Centre& centre = s.centres[first_row_[layer] + head];
    if (centre.frozen) return;
    const pages::Row& row = row_of(s, layer, head);
    const int dim = layers_[layer].head_dim;
    std::vector<float> k(static_cast<size_t>(kSlots) * dim), v(k.size());
    std::vector<double> sum(dim, 0.0), squares(dim, 0.0);
    PoolView pools[kMaxPools];
    views(pools);
    int64_t n = 0;
    for (int e = 0; e < row.entries(); ++e) {
        if (state_of(row.page[e]) != State::full) continue;
        ops::dequantize({&row.page[e], nullptr, nullptr, 1, dim, k.data(), v.data(), pools, 1});
        for (uint16_t m = row.alive[e]; m; m &= m - 1, ++n) {
            const float* key = &k[static_cast<size_t>(std::countr_zero(m)) * dim];
            for (int d = 0; d < dim; ++d) {
                sum[d] += key[d];
                squares[d] += static_cast<double>(key[d]) * key[d];
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
    if (any) centre.mean = std::make_shared<const std::vector<float>>(std::move(mean));
}

}  // namespace kvstrata::store
