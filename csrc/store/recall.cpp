// Recall: a step of one token reads sinks and tail, and of the rest the pages that its summaries promise most of; other steps
// read all, Far pages through the ring.
//
// Parts are merged in a fixed order, and what is read does not depend on where it lay: hit or miss, the same bits.
#include <algorithm>
#include <bit>
#include <utility>

#include "common/check.h"
#include "ops/merge.h"
#include "ops/summarize.h"
#include "ops/summarize_groups.h"
#include "ops/supported.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

const void* moved(const void* base, int64_t elements, DType type) {
    return static_cast<const char*>(base) + elements * dtype_bytes(type);
}
void* moved(void* base, int64_t elements, DType type) {
    return static_cast<char*>(base) + elements * dtype_bytes(type);
}

}  // namespace

int64_t Parts::bytes() const {
    const auto of = [](const auto& v) { return static_cast<int64_t>(v.capacity() * sizeof(v[0])); };
    return of(tokens) + of(ends) + of(whole) + of(rows) + of(indices) + of(out[0]) + of(out[1]) + of(lse[0]) +
           of(lse[1]) + of(out[2]) + of(lse[2]) + of(rest) + of(zone) + of(votes) + of(x) + of(picked) + of(exact) +
           of(pages) + of(masks) + of(selected) + of(far) + of(select) + of(misses) + of(ready) + of(unmeasured);
}

bool Store::indexed(int layer) const { return layers_[layer].window == 0 && !dense_[layer]; }

// Sinks are whole pages at the beginning of the row; they stay as they are and are always read. Those that were dropped are
// not there.
int Store::first_indexed(const pages::Row& row) const {
    const int most = std::min<int>(row.sealed, options_.sinks / kSlots);
    int first = 0;
    for (; first < most; ++first) {
        const PageId page = row.page[first];
        const int32_t* const positions = pools_[page_pool(page)].positions(page);
        if (positions[std::countr_zero(row.alive[first])] >= options_.sinks) break;
    }
    return first;
}

// --- the index ---------------------------------------------------------------------------------------------------------------

// Summaries of new pages follow in `out`; their bytes lie in the pages `at`, if given.
void Store::summarize(Sequence& s, int layer, int head, std::span<const pages::Fresh> pages,
                      const std::vector<PageId>* at, Index& out) {
    const float* const mean = centre(s, layer, head);
    std::vector<ops::SummaryItem> items;
    for (size_t i = 0; i < pages.size(); ++i) {
        const Index::Place to = out.append();
        items.push_back({at ? (*at)[i] : pages[i].page, pages[i].alive, mean, to.block, to.lane});
    }
    PoolView pools[kMaxPools];
    views(pools);
    ops::summarize({items.data(), static_cast<int32_t>(items.size()), layers_[layer].head_dim, pools, threads_,
                    options_.recall.kind});
}

// Pages that were sealed since: they are Near.
void Store::summarize_sealed(Sequence& s, int layer, int head) {
    Index& index = s.indices[first_row_[layer] + head];
    const pages::Row& row = row_of(s, layer, head);
    if (index.count() >= row.sealed) return;
    std::vector<pages::Fresh> pages;
    for (int e = index.count(); e < row.sealed; ++e) pages.push_back({row.page[e], row.visible[e], 0, {}});
    summarize(s, layer, head, pages, nullptr, index);
}

// Whether groups of a row's pages are scored first.
bool Store::in_groups(const pages::Row& row) const {
    return row.sealed > options_.recall.flat_pages && ops::has_groups(options_.recall.kind);
}

// Of a long row, whole groups that are not summarized yet: its entries are, and its masks are as they stand.
void Store::summarize_groups(Sequence& s, int layer, int head) {
    Index& index = s.indices[first_row_[layer] + head];
    const pages::Row& row = row_of(s, layer, head);
    if (!in_groups(row)) return index.narrowed(0);
    std::vector<ops::GroupItem> items;
    for (int i = index.groups(); i < std::min(index.count(), row.sealed) / ops::kGroupPages; ++i) {
        const unsigned char* const* const from = index.blocks() + i * ops::kGroupBlocks;
        const Index::Place to = index.append_group();
        items.push_back({{from[0], from[1]}, row.visible.data() + i * ops::kGroupPages, to.block, to.lane});
    }
    if (!items.empty()) {
        ops::summarize_groups({items.data(), static_cast<int32_t>(items.size()), layers_[layer].head_dim, threads_});
    }
}

// A Far page is read through the first place of the ring. Nothing has changed if one cannot be read.
void Store::summarize_anew(SummaryKind kind) {
    check(!open_, "summarize_anew: a step is open, expected none");
    const SummaryKind before = std::exchange(options_.recall.kind, kind);
    std::vector<std::pair<Index*, Index>> made;
    try {
        for (auto& [id, s] : sequences_) {
            for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
                for (int h = 0; recalls(l) && h < layers_[l].kv_heads; ++h) {
                    made.emplace_back(&s->indices[first_row_[l] + h], summarized(*s, l, h));
                }
            }
        }
    } catch (...) {
        options_.recall.kind = before;
        throw;
    }
    for (auto& [place, index] : made) *place = std::move(index);
}

// The index of a row, made of its pages.
Index Store::summarized(Sequence& s, int layer, int head) {
    Index index(layers_[layer].head_dim, options_.recall.kind);
    const pages::Row& row = row_of(s, layer, head);
    for (int e = 0; e < row.sealed; ++e) {
        PageId page = row.page[e];
        if (far(page)) {
            const PageId stage = ring_of(page_pool(page))[0];
            read_far(page, stage);
            page = stage;
        }
        const pages::Fresh one{page, row.visible[e], 0, {}};
        summarize(s, layer, head, {&one, 1}, nullptr, index);
    }
    return index;
}

// Before a row's table takes a plan: summaries of what stays, then those of the new pages.
void Store::join_index(Sequence& s, int layer, int head, const Repack& r, const Index& fresh) {
    Index& index = s.indices[first_row_[layer] + head];
    std::vector<int32_t> stay;
    const pages::Row& row = row_of(s, layer, head);
    for (int e = 0; e < row.sealed; ++e) {
        if (!r.gone(e) && r.keep[e] != row.alive[e]) index.narrowed(e);
        if (!r.gone(e)) stay.push_back(e);
    }
    index.keep(stay);
    index.join(fresh);
}

// --- what a step reads ---------------------------------------------------------------------------------------------------------

void Store::set_recall(const Recall& recall) {
    const int near = recall.near_pages, reads = recall.widest();
    const bool through_ring = near == 0 && (options_.far.empty() || reads <= options_.ring);
    check(near >= reads || through_ring, "set_recall: near_pages is ", near, ", expected at least the ", reads,
          " pages that a step reads, or 0 where the ring of ", options_.ring, " holds them");
    check(recall.oracle == Oracle::none || options_.far.empty(),
          "set_recall: an oracle reads every token to choose, expected no Far tier");
    find_anchors(recall.reuse);
    if (recall.kind != options_.recall.kind) summarize_anew(recall.kind);
    options_.recall = recall;
    for (auto& [id, s] : sequences_) {
        for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
            for (int h = 0; recalls(l) && h < layers_[l].kv_heads; ++h) summarize_groups(*s, l, h);
        }
    }
    shrink_copies(near);
}

void Store::shrink_copies(int most) {
    for (auto& [id, s] : sequences_) {
        for (pages::Row& row : s->rows) row.near.shrink(most, pools_);
    }
}

bool Store::shrink_near() {
    const int widest = options_.recall.widest(), now = options_.recall.near_pages;
    const int less = now > widest ? widest : widest <= options_.ring ? 0 : now;
    if (less == now) return false;
    options_.recall.near_pages = less;
    shrink_copies(less);
    return true;
}

// --- attention in parts ----------------------------------------------------------------------------------------------------------

// The rows of the call as attend() has filled them, with their tables.
void Store::begin_parts(int layer) {
    parts_.whole = attend_rows_;
    parts_.rows.clear();
    parts_.indices.clear();
    for (const StepSequence& s : step_) {
        for (int h = 0; s.count > 0 && h < layers_[layer].kv_heads; ++h) {
            parts_.rows.push_back(&row_of(*s.sequence, layer, h));
            if (recalls(layer)) parts_.indices.push_back(&s.sequence->indices[first_row_[layer] + h]);
        }
    }
}

// Row r of the call over the list [first, end) into a part's place: out [T, G, D] and lse [T, G] from token tokens[0] on. Only
// part 0 has the call's own tokens and sink logits.
ops::AttendRow Store::part_row(int r, int group, int dim, int part, size_t first, size_t end, float* out, float* lse,
                               const int32_t* tokens) const {
    ops::AttendRow row = parts_.whole[r];
    if (part > 0) row.own = 0, row.sinks = nullptr;
    row.q = moved(row.q, row.tokens[0] * row.q_stride_t, options_.dtype);
    row.tokens = tokens;
    row.pages = parts_.pages.data() + first;
    row.visible = parts_.masks.data() + first;
    row.entries = static_cast<int32_t>(end - first);
    row.out = out;
    row.out_stride_t = static_cast<int64_t>(group) * dim;
    row.out_stride_g = dim;
    row.lse = lse;
    row.lse_stride_t = group;
    row.lse_stride_g = 1;
    return row;
}

// The given parts of one query of a row, each [G, D] and [G], merged to where the call wants them. lse [G] out.
void Store::write_out(const ops::AttendRow& whole, int t, std::span<const float* const> outs,
                      std::span<const float* const> lses, int group, int dim, DType dtype, float* lse) const {
    const int64_t token = whole.tokens[t];
    void* const out = moved(whole.out, token * whole.out_stride_t, dtype);
    const float *out_at[3], *lse_at[3];
    const int step = whole.out_stride_g == dim ? group : 1;
    for (int g = 0; g < group; g += step) {
        for (size_t j = 0; j < outs.size(); ++j) out_at[j] = outs[j] + int64_t{g} * dim, lse_at[j] = lses[j] + g;
        void* const to = static_cast<char*>(out) + g * whole.out_stride_g * dtype_bytes(dtype);
        ops::merge({out_at, lse_at, static_cast<int32_t>(outs.size()), step, dim, to, dtype, lse + g, 1});
    }
    for (int g = 0; whole.lse && g < group; ++g)
        whole.lse[token * whole.lse_stride_t + g * whole.lse_stride_g] = lse[g];
}

}  // namespace kvstrata::store
