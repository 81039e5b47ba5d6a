// Layers that read what an earlier one has selected, and selectors of the caller's.
//
// A layer follows its anchor, the first of `reuse` indexed layers, sequence by sequence: where the pages that the anchor's rows
// have selected hold the same tokens in its own rows, at the same entries. Otherwise it selects for itself, by its own summaries.
#include <algorithm>
#include <bit>

#include "common/check.h"
#include "store/store.h"

namespace kvstrata::store {

// Which layers are anchors. Those that read all follow none.
void Store::find_anchors(int reuse) {
    std::vector<int> anchors(layers_.size());
    int in_group = 0, anchor = -1;
    for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
        anchors[l] = l;
        if (!indexed(l)) continue;
        if (in_group == 0) anchor = l;
        if (layers_[l].kv_heads != layers_[anchor].kv_heads) {
            throw Unsupported(message("Store: layer ", l, " has ", layers_[l].kv_heads, " KV heads, layer ", anchor,
                                      ", whose selection it reads, has ", layers_[anchor].kv_heads,
                                      ", expected as many"));
        }
        anchors[l] = anchor;
        in_group = (in_group + 1) % std::max(1, reuse);
    }
    anchor_ = std::move(anchors);
    chosen_ = {};
}

// Whether the rows from `first` on, of a sequence's heads, hold the tokens of what their anchor has selected where it has them.
bool Store::follows(int layer, size_t first, const Sequence& s) const {
    const int most = options_.recall.widest();
    for (int h = 0; h < layers_[layer].kv_heads; ++h) {
        const size_t r = first + static_cast<size_t>(h);
        const pages::Row &own = *parts_.rows[r], &anchor = s.rows[first_row_[anchor_[layer]] + h];
        for (int i = 0; i < chosen_.count[r]; ++i) {
            const int e = chosen_.selected[r * most + i];
            if (e >= own.sealed || own.visible[e] != anchor.visible[e] || own.alive[e] != anchor.alive[e]) return false;
            const int32_t* const at = pools_[page_pool(own.page[e])].positions(own.page[e]);
            const int32_t* const there = pools_[page_pool(anchor.page[e])].positions(anchor.page[e]);
            for (uint16_t m = own.alive[e]; m; m &= m - 1) {
                if (at[std::countr_zero(m)] != there[std::countr_zero(m)]) return false;
            }
        }
    }
    return true;
}

// Rows of the call that follow have their selection; of the others, none yet.
void Store::follow(int layer) {
    if (anchor_[layer] == layer || chosen_.layer != anchor_[layer]) return;
    const int most = options_.recall.widest();
    size_t first = 0;
    for (const StepSequence& s : step_) {
        if (s.count == 0) continue;
        const size_t end = first + layers_[layer].kv_heads;
        if (follows(layer, first, *s.sequence)) {
            for (size_t r = first; r < end; ++r) {
                ops::SelectRow& row = parts_.select[r];
                std::copy_n(chosen_.selected.data() + r * most, most, row.selected);
                row.count = chosen_.count[r];
                parts_.unmeasured[r] = 2;
            }
        }
        first = end;
    }
}

// Selects for the rows that do not follow.
void Store::run_select(int layer, ops::SelectParams& p) {
    std::vector<ops::SelectRow> rows;
    for (size_t r = 0; r < parts_.select.size(); ++r) {
        if (parts_.unmeasured[r] < 2) rows.push_back(parts_.select[r]);
    }
    const auto put_back = [&] {
        size_t next = 0;
        for (size_t r = 0; r < parts_.select.size(); ++r) {
            if (parts_.unmeasured[r] < 2) parts_.select[r] = rows[next++];
        }
    };
    p.rows = rows.data(), p.n_rows = static_cast<int32_t>(rows.size());
    if (rows.empty()) return;
    if (choose_) {
        choose_(p);
        return put_back();
    }
    p.workspace = workspace(ops::select_workspace_bytes(p));
    try {
        ops::select(p);
    } catch (const Invalid&) {
        put_back();
        refuse_unranked(layer);
        throw;
    }
    put_back();
}

// For the layers that follow this one.
void Store::note_chosen(int layer) {
    if (options_.recall.reuse <= 1 || anchor_[layer] != layer) return;
    chosen_.layer = layer;
    chosen_.selected = parts_.selected;
    chosen_.count.clear();
    for (const ops::SelectRow& row : parts_.select) chosen_.count.push_back(row.count);
}

}  // namespace kvstrata::store
