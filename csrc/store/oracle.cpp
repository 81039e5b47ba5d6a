// What a selection can be at best: every token is read to choose by its true share of attention. For tests and evaluations.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops/mass.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

// The n of highest value, ties the lower index, by rising index.
std::vector<int32_t> best(const std::vector<float>& values, size_t n) {
    std::vector<int32_t> order(values.size());
    std::iota(order.begin(), order.end(), 0);
    n = std::min(n, order.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(n), order.end(),
                      [&](int32_t a, int32_t b) { return values[a] != values[b] ? values[a] > values[b] : a < b; });
    order.resize(n);
    std::sort(order.begin(), order.end());
    return order;
}

}  // namespace

// Leaves in parts_ what select_pages does: entries and, of the best tokens, their masks; for rest, the log-sum-exp of all.
void Store::select_exactly(int layer, const AttendCall& call) {
    const LayerShape& shape = layers_[layer];
    const int group = shape.q_heads / shape.kv_heads, n = static_cast<int>(parts_.whole.size());
    const bool tokens = options_.recall.oracle == Oracle::tokens;
    const int most = options_.recall.pages * (tokens ? kSlots : 1);
    parts_.selected.assign(static_cast<size_t>(n) * most, -1);
    parts_.picked.assign(tokens ? parts_.selected.size() : 0, 0);
    parts_.rest.resize(static_cast<size_t>(n) * group);
    parts_.select.assign(n, {});
    parts_.unmeasured.assign(n, 0);
    for (int r = 0; r < n; ++r) {
        const pages::Row& row = *parts_.rows[r];
        const int first = first_indexed(row);
        std::vector<float> share = true_shares(layer, call, r, first);
        std::vector<uint16_t> masks(share.size() / kSlots, 0);
        if (tokens) {
            for (int32_t slot : best(share, static_cast<size_t>(most))) {
                if (share[slot] >= 0.0f) masks[slot / kSlots] |= static_cast<uint16_t>(1u << slot % kSlots);
            }
        } else {
            std::vector<float> vote(masks.size(), 0.0f);
            for (size_t slot = 0; slot < share.size(); ++slot) vote[slot / kSlots] += std::max(share[slot], 0.0f);
            for (int32_t e : best(vote, static_cast<size_t>(most))) masks[e] = row.visible[first + e];
        }
        ops::SelectRow& out = parts_.select[r];
        out.selected = parts_.selected.data() + static_cast<int64_t>(r) * most;
        for (size_t e = 0; e < masks.size(); ++e) {
            if (!masks[e]) continue;
            if (tokens) parts_.picked[static_cast<size_t>(r) * most + out.count] = masks[e];
            out.selected[out.count++] = first + static_cast<int32_t>(e);
        }
    }
    refuse_unranked(layer);
}

// Of each slot of a row's entries from `first` to the tail: its share of all attention, summed over the heads; -1: not visible.
// Of a row with a key that is not finite only which entry is not ranked.
std::vector<float> Store::true_shares(int layer, const AttendCall& call, int r, int first) {
    const LayerShape& shape = layers_[layer];
    const int group = shape.q_heads / shape.kv_heads, dim = shape.head_dim;
    const pages::Row& row = *parts_.rows[r];
    const int entries = row.sealed - first;
    std::vector<float> share(static_cast<size_t>(entries) * kSlots);
    std::vector<float> out(static_cast<size_t>(group) * dim), lse(group), logits(share.size() * group);
    float* const all = parts_.rest.data() + static_cast<int64_t>(r) * group;
    std::copy_n(parts_.lse[0].data() + static_cast<int64_t>(r) * group, group, all);
    if (entries == 0) return share;
    begin_lists();
    for (int e = first; e < row.sealed; ++e) list_page(row, e, row.page[e]);
    attend_rows_.assign(1, part_row(r, group, dim, 1, 0, parts_.pages.size(), out.data(), lse.data(), nullptr));
    attend_rows_[0].logits = logits.data();
    attend_now(layer, call, DType::f32);
    for (size_t i = 0; i < logits.size(); ++i) {
        const int e = first + static_cast<int>(i % share.size()) / kSlots;
        if (std::isfinite(logits[i]) || !(row.visible[e] >> i % kSlots & 1)) continue;
        parts_.select[r].unranked = e;
        return share;
    }
    for (int g = 0; g < group; ++g) all[g] = logaddexp(all[g], lse[g]);
    ops::mass({logits.data(), all, share.data(), 1, group, 1, entries, ops::Reduce::sum, threads_});
    for (int slot = 0; slot < entries * kSlots; ++slot) {
        if (!(row.visible[first + slot / kSlots] >> slot % kSlots & 1)) share[slot] = -1.0f;
    }
    return share;
}

}  // namespace kvstrata::store
