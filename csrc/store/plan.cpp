// apply_plan: the only code that changes the state of a token. It writes new pages, switches the table, frees the old ones.
//
// Survivors of touched pages are packed by (format, position) into new pages. A page is touched if one of its tokens
// changes state, or if it is part-filled and others of its format are packed anyway: so a row never holds two part-filled
// sealed pages of one format after a plan that moves anything.
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

constexpr int kStates = 5;
constexpr int kCentreTokens = 256;    // fewer stored tokens do not tell a mean
constexpr double kCentreRatio = 2.0;  // of |mean| to standard deviation, from which a channel is centred

struct Survivor {
    int32_t position;
    PageId page;
    int32_t slot;
    State now;
    uint32_t note;
};

// What a row's plan comes to: entries that leave, survivors to pack by their new state, masks of the tail.
struct Repack {
    std::vector<uint8_t> gone;          // [sealed entries]
    std::vector<uint16_t> tail_keep;    // [tail entries]
    std::vector<Survivor> to[kStates];  // by new state, in order of position
    bool changes = false;

    int64_t pages(int state) const { return (static_cast<int64_t>(to[state].size()) + kSlots - 1) / kSlots; }
};

bool holds(const pages::Row& row, int entry, State now, const uint8_t* want) {
    for (int i = 0; i < std::popcount(row.alive[entry]); ++i) {
        if (want[i] != static_cast<uint8_t>(now)) return false;
    }
    return true;
}

template <class StateOf>
Repack repack(const pages::Row& row, const uint8_t* want, pages::Pools& pools, StateOf state_of) {
    Repack r;
    r.gone.assign(row.sealed, 0);
    std::vector<const uint8_t*> wants(row.entries());
    bool packs[kStates] = {};
    for (int e = 0; e < row.entries(); ++e) {
        wants[e] = want;
        want += std::popcount(row.alive[e]);
        if (e >= row.sealed || holds(row, e, state_of(row.page[e]), wants[e])) continue;
        r.gone[e] = 1;
        for (const uint8_t* w = wants[e]; w < want; ++w) packs[*w] = true;
    }
    for (int e = 0; e < row.sealed; ++e) {
        const State now = state_of(row.page[e]);
        if (row.alive[e] != kAllSlots && packs[static_cast<int>(now)]) r.gone[e] = 1;
        if (!r.gone[e]) continue;
        r.changes = true;
        const int32_t* pos = pool_of(pools, row.page[e]).positions(row.page[e]);
        int i = 0;
        for (uint16_t m = row.alive[e]; m; m &= m - 1, ++i) {
            const int slot = std::countr_zero(m);
            if (!wants[e][i]) continue;
            const uint32_t note = row.noted ? row.note[static_cast<size_t>(e) * kSlots + slot] : 0;
            r.to[wants[e][i]].push_back({pos[slot], row.page[e], slot, now, note});
        }
    }
    for (int e = row.sealed; e < row.entries(); ++e) {
        uint16_t keep = row.alive[e];
        int i = 0;
        for (uint16_t m = row.alive[e]; m; m &= m - 1, ++i) {
            if (!wants[e][i]) keep &= static_cast<uint16_t>(~(1u << std::countr_zero(m)));
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

std::vector<int64_t> Store::plan_pages(int layer, SeqId seq, int head, const uint8_t* state) {
    std::vector<int64_t> need(pools_.size(), 0);
    const Repack r =
        repack(row_of(find(seq, "plan_pages"), layer, head), state, pools_, [this](PageId id) { return state_of(id); });
    for (int s = 1; s < kStates; ++s) {
        if (r.pages(s)) need[pool_of(layer, static_cast<State>(s))] += r.pages(s);
    }
    return need;
}

// One row, all or nothing. Its new pages must be free: plan_pages says how many.
void Store::apply_plan(int layer, SeqId seq, int head, const uint8_t* state) {
    Sequence& s = find(seq, "apply_plan");
    pages::Row& row = row_of(s, layer, head);
    const Repack r = repack(row, state, pools_, [this](PageId id) { return state_of(id); });
    if (!r.changes) return;
    fault::hit("plan.after_check");
    std::vector<pages::Fresh> fresh;
    std::vector<ops::Move> copies, encodes;
    try {
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
        throw;
    }
    const int32_t before = row.stored;
    pages::replace(row, r.gone, fresh, r.tail_keep, pools_);
    if (row.stored != before) s.floor = std::max(s.floor, base(s, seen(layer, s)));
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
