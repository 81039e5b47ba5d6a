// What a step of one token reads: the pages that the summaries promise most of, and what that is estimated to miss.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "common/check.h"
#include "ops/summarize_groups.h"
#include "ops/supported.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

}  // namespace

float logaddexp(float a, float b) {
    const float most = std::max(a, b);
    return most == kMinusInf ? most : most + std::log(std::exp(a - most) + std::exp(b - most));
}

// Sinks and tail, then what is selected by them, then what is estimated of the rest: merged in this order.
void Store::attend_selected(int layer, const AttendCall& call) {
    const LayerShape& shape = layers_[layer];
    const int group = shape.q_heads / shape.kv_heads, dim = shape.head_dim;
    const int n = static_cast<int>(attend_rows_.size());
    begin_parts(layer);
    ++clock_;
    const int audited = anchor_[layer] == layer && !choose_ ? audited_row(n) : -1;
    if (audited >= 0) audit(layer, call, audited);
    for (int part = 0; part < 2; ++part) {
        parts_.out[part].resize(static_cast<size_t>(n) * group * dim);
        parts_.lse[part].resize(static_cast<size_t>(n) * group);
    }
    begin_lists();
    for (int r = 0; r < n; ++r) {
        const pages::Row& row = *parts_.rows[r];
        for (int e = 0, first = first_indexed(row); e < first; ++e) list_page(row, e, row.page[e]);
        for (int e = row.sealed; e < row.entries(); ++e) list_page(row, e, row.page[e]);
        parts_.ends.push_back(parts_.pages.size());
    }
    parts_.ready.resize(n);
    std::iota(parts_.ready.begin(), parts_.ready.end(), 0);
    attend_lists(layer, call, 0, 0, parts_.ready);
    const bool exactly = options_.recall.oracle != Oracle::none;
    exactly ? select_exactly(layer, call) : select_pages(layer, call);
    const size_t parts = options_.recall.estimate > 0.0f ? 3 : 2;
    attend_fetched(layer, call);
    for (int r = 0; r < n; ++r) {
        const int64_t at = static_cast<int64_t>(r) * group;
        const float *outs[3], *lses[3];
        for (size_t part = 0; part < parts; ++part) {
            outs[part] = parts_.out[part].data() + at * dim;
            lses[part] = parts_.lse[part].data() + at;
        }
        float lse[ops::kMaxGroup];
        write_out(parts_.whole[r], 0, {outs, parts}, {lses, parts}, group, dim, call.out_dtype, lse);
        if (parts_.unmeasured[r]) continue;
        note_captured(lses, parts_.rest.data() + at, group, r == audited ? parts_.exact.data() : nullptr);
    }
    settle_workspace(longest_);
    hint_next(layer);
}

void Store::begin_lists() {
    parts_.pages.clear();
    parts_.masks.clear();
    parts_.ends.assign(1, 0);
}

void Store::list_page(const pages::Row& row, int entry, PageId page) {
    parts_.pages.push_back(page);
    parts_.masks.push_back(row.visible[entry]);
}

// The lists of some rows, rising, of those from `first` on, into their part's places.
void Store::attend_lists(int layer, const AttendCall& call, int part, int first, std::span<const int32_t> rows) {
    const LayerShape& shape = layers_[layer];
    const int group = shape.q_heads / shape.kv_heads, dim = shape.head_dim;
    attend_rows_.clear();
    for (int32_t r : rows) {
        const int64_t at = static_cast<int64_t>(r) * group;
        attend_rows_.push_back(part_row(r, group, dim, part, parts_.ends[r - first], parts_.ends[r - first + 1],
                                        parts_.out[part].data() + at * dim, parts_.lse[part].data() + at, nullptr));
    }
    attend_now(layer, call, DType::f32);
}

void Store::select_pages(int layer, const AttendCall& call) {
    const LayerShape& shape = layers_[layer];
    const Recall& recall = options_.recall;
    const int group = shape.q_heads / shape.kv_heads, n = static_cast<int>(parts_.whole.size()), most = recall.widest();
    parts_.selected.resize(static_cast<size_t>(n) * most);
    parts_.votes.resize(recall.most > 0 ? parts_.selected.size() : 0);
    parts_.x.resize(parts_.votes.size() * group);
    parts_.picked.clear();
    parts_.rest.resize(static_cast<size_t>(n) * group);
    parts_.select.assign(n, {});
    parts_.unmeasured.assign(n, choose_ ? 1 : 0);
    size_t zones = 0;
    for (int r = 0; r < n; ++r) zones += parts_.select[r].zone_most = zone_room(*parts_.rows[r]);
    parts_.zone.resize(zones);
    int32_t* zone = parts_.zone.data();
    for (int r = 0; r < n; ++r) {
        const pages::Row& row = *parts_.rows[r];
        const ops::AttendRow& whole = parts_.whole[r];
        ops::SelectRow& out = parts_.select[r];
        out.q = static_cast<const unsigned char*>(whole.q) +
                whole.tokens[0] * whole.q_stride_t * dtype_bytes(options_.dtype);
        out.q_stride_g = whole.q_stride_g;
        out.blocks = parts_.indices[r]->blocks();
        out.visible = row.visible.data();
        if (in_groups(row) && parts_.indices[r]->groups() > 0) {
            out.group_blocks = parts_.indices[r]->group_blocks();
            out.groups = parts_.indices[r]->groups();
            out.expand = std::max(ops::kLeastGroups, static_cast<int>(std::ceil(recall.expand * out.groups)));
        }
        out.lse_base = parts_.lse[0].data() + static_cast<int64_t>(r) * group;
        out.first = first_indexed(row);
        out.entries = row.sealed;
        out.most = most;
        out.selected = parts_.selected.data() + static_cast<int64_t>(r) * most;
        out.lse_rest = parts_.rest.data() + static_cast<int64_t>(r) * group;
        if (recall.most > 0) {
            out.votes = parts_.votes.data() + static_cast<int64_t>(r) * most;
            out.selected_x = parts_.x.data() + static_cast<int64_t>(r) * group * most;
        }
        if (recall.estimate > 0.0f) {
            out.zone = zone;
            zone += out.zone_most;
            out.zone_most = std::max(0, out.zone_most - most);  // the others are for what sharing takes from it
        }
    }
    ops::SelectParams p{
        parts_.select.data(), n,       group,    shape.head_dim, options_.dtype, call.scale,  recall.weight,
        recall.aggregate,     nullptr, threads_, recall.kind,    call.softcap,   recall.mass, recall.least};
    follow(layer);
    run_select(layer, p);
    for (int r = 0; recall.most > 0 && r < n; r += shape.kv_heads) {
        if (!parts_.unmeasured[r]) share_pages(r, shape.kv_heads);
    }
    note_chosen(layer);
}

// Says of which token's page a selection could not tell the mass, or of which query.
void Store::refuse_unranked(int layer) {
    size_t r = 0;
    for (size_t b = 0; b < step_.size(); ++b) {
        for (int h = 0; step_[b].count > 0 && h < layers_[layer].kv_heads; ++h, ++r) {
            const int entry = parts_.select[r].unranked;
            if (entry < 0) continue;
            const PageId page = parts_.rows[r]->page[entry];
            const int slot = std::countr_zero(parts_.rows[r]->alive[entry]);
            throw Invalid(message("attend: layer ", layer, ", head ", h, " of the ", b,
                                  ". sequence of the step: the query or"
                                  " keys of the page of position ",
                                  pages::pool_of(pools_, page).positions(page)[slot],
                                  " are not finite; expected finite ones, such a page could not be found again"));
        }
    }
}

// Places for the zone of a row: its share of the pages that are not read, and those that sharing may take from it.
int Store::zone_room(const pages::Row& row) const {
    const float share = options_.recall.estimate;
    if (share == 0.0f) return 0;
    const int read = options_.recall.mass > 0.0f ? std::min(options_.recall.least, options_.recall.pages)
                                                 : options_.recall.pages;  // at the least
    const int outside = std::max(0, row.sealed - first_indexed(row) - read);
    return static_cast<int>(std::ceil(share * static_cast<float>(outside))) + options_.recall.widest();
}

// Of what the rows of a sequence have selected, the K each of highest vote stay, ties those of the lower row and entry; at
// least `least` of each row. Their order stays; what a row gives up is of its rest.
void Store::share_pages(int first, int rows) {
    const Recall& recall = options_.recall;
    struct Choice {
        bool given;  // one of the row's best
        float vote;
        int row, place;
    };
    std::vector<Choice> all;
    for (int r = first; r < first + rows; ++r) {
        const ops::SelectRow& row = parts_.select[r];
        const size_t begin = all.size();
        for (int i = 0; i < row.count; ++i) all.push_back({false, row.votes[i], r, i});
        std::sort(all.begin() + static_cast<int64_t>(begin), all.end(), [](const Choice& a, const Choice& b) {
            return std::tuple(-a.vote, a.place) < std::tuple(-b.vote, b.place);
        });
        for (int i = 0; i < std::min(recall.least, row.count); ++i) all[begin + i].given = true;
    }
    const size_t most = static_cast<size_t>(recall.pages) * rows;
    if (all.size() <= most) return;
    std::sort(all.begin(), all.end(), [](const Choice& a, const Choice& b) {
        return std::tuple(!a.given, -a.vote, a.row, a.place) < std::tuple(!b.given, -b.vote, b.row, b.place);
    });
    const int group = static_cast<int>(parts_.rest.size() / parts_.select.size());
    for (size_t i = most; i < all.size(); ++i) {
        ops::SelectRow& row = parts_.select[all[i].row];
        float* const rest = parts_.rest.data() + static_cast<int64_t>(all[i].row) * group;
        for (int g = 0; g < group; ++g) {
            rest[g] = logaddexp(rest[g], row.selected_x[static_cast<int64_t>(g) * row.most + all[i].place]);
        }
        if (row.zone) row.zone[row.zone_count++] = row.selected[all[i].place];
        row.selected[all[i].place] = -1;
    }
    for (int r = first; r < first + rows; ++r) {
        ops::SelectRow& row = parts_.select[r];
        if (row.zone) std::sort(row.zone, row.zone + row.zone_count);
        int32_t* const end = std::remove(row.selected, row.selected + row.count, -1);
        std::fill(end, row.selected + row.count, -1);
        row.count = static_cast<int32_t>(end - row.selected);
    }
}

// What was not read, by the means of its pages: the third part.
void Store::estimate_rest(int layer, const AttendCall& call) {
    const LayerShape& shape = layers_[layer];
    const int group = shape.q_heads / shape.kv_heads, n = static_cast<int>(parts_.whole.size());
    parts_.out[2].resize(static_cast<size_t>(n) * group * shape.head_dim);
    parts_.lse[2].resize(static_cast<size_t>(n) * group);
    std::vector<ops::EstimateRow> rows;
    for (int r = 0; r < n; ++r) {
        const ops::SelectRow& chosen = parts_.select[r];
        const int64_t at = static_cast<int64_t>(r) * group;
        rows.push_back({chosen.q, chosen.q_stride_g, chosen.blocks, chosen.visible, chosen.zone, chosen.entries,
                        chosen.zone_count, parts_.out[2].data() + at * shape.head_dim, parts_.lse[2].data() + at});
    }
    ops::EstimateParams p{
        rows.data(),  n,       group,   shape.head_dim, options_.dtype, call.scale, options_.recall.weight,
        call.softcap, nullptr, threads_};
    p.workspace = workspace(ops::estimate_workspace_bytes(p));
    ops::estimate(p);
}

// read [2][G]: of the parts of a row that were read; rest [G], of an oracle that of all; exact [G], or null: of all that the
// row holds.
void Store::note_captured(const float* const* read, const float* rest, int group, const float* exact) {
    for (int g = 0; g < group; ++g) {
        const float lse = logaddexp(read[0][g], read[1][g]);
        float share = rest[g] == kMinusInf ? 1.0f : 1.0f / (1.0f + std::exp(rest[g] - lse));
        if (options_.recall.oracle != Oracle::none) share = std::min(1.0f, std::exp(lse - rest[g]));
        captured_.sum += share;
        captured_.least = std::min(captured_.least, share);
        captured_.below += share < mass_floor_;
        ++captured_.count;
        if (!exact) continue;
        audited_.estimated += share;
        audited_.exact += std::min(1.0f, std::exp(lse - exact[g]));
        ++audited_.count;
    }
}

// The row of this call that is to be read whole, or -1: one in each `audit` passes over the layers, each time another layer.
int Store::audited_row(int rows) const {
    if (options_.recall.audit <= 0) return -1;
    const int period = options_.recall.audit * n_indexed_ + 1;  // no multiple of the layers
    const int round = clock_ / period / n_indexed_;             // of all layers, each time another row
    return clock_ % period ? -1 : round % rows;
}

void Store::audit(int layer, const AttendCall& call, int r) {
    const int group = layers_[layer].q_heads / layers_[layer].kv_heads;
    attend_rows_.resize(1);
    stream_row(layer, call, r);
    parts_.exact.assign(parts_.lse[0].begin(), parts_.lse[0].begin() + group);
}

}  // namespace kvstrata::store
