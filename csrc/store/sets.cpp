// Sets of pages: what a view shows, and queries beside a sequence's own that say what its pages are worth.
#include <algorithm>
#include <bit>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/layout.h"
#include "store/store.h"

namespace kvstrata::store {

void Store::set_view(SeqId seq, pages::View view) {
    check(options_.sets, "set_view: this store has no sets");
    for (pages::SetTag set : view.sets) {
        check(set != pages::kBackbone && set <= pages::kMaxSet, "set_view: sets has ", set, ", expected 1..",
              pages::kMaxSet);
    }
    Sequence& s = find(seq, "set_view");
    s.view = std::move(view);
    ++views_;
    for (pages::SetTag set : s.view.sets) {
        if (set >= s.routed.size()) s.routed.resize(set + 1, 0);
        s.routed[set] = views_;
    }
    for (pages::Row& row : s.rows) turn(row, s.view);
}

// Pages that come into sight and are Near still need no read.
void Store::turn(pages::Row& row, const pages::View& view) {
    for (int e = 0; e < row.aside; ++e) hits_ += view.shows(row.set[e]) && !far(row.page[e]);
    pages::arrange(row, view);
}

void Store::show(int layer, SeqId seq, bool all) {
    check_layer(layer, "show");
    Sequence& s = find(seq, "show");
    for (int h = 0; h < layers_[layer].kv_heads; ++h) turn(row_of(s, layer, h), all ? pages::View{} : s.view);
}

// A page that is shared with another row, or has a Far page of its own, needs no new one there.
std::vector<int64_t> Store::moving(int layer, SeqId seq) {
    check_layer(layer, "moving");
    Sequence& s = find(seq, "moving");
    std::vector<int64_t> pages(pools_.size(), 0);
    for (int h = 0; h < layers_[layer].kv_heads && !options_.far.empty(); ++h) {
        const pages::Row& row = row_of(s, layer, h);
        for (int e = 0; e < row.sealed; ++e) {
            const PageId page = row.page[e];
            if (e >= row.aside && far(page)) ++pages[near_of(page_pool(page))];
            if (e < row.aside && goes_far(row, e) && row.back[e] == kNoPage) ++pages[far_of(layer, page)];
        }
    }
    return pages;
}

// One page after another, each whole: an error leaves those that were not read Far.
void Store::bring(int layer, SeqId seq) {
    check_layer(layer, "bring");
    Sequence& s = find(seq, "bring");
    for (int h = 0; h < layers_[layer].kv_heads; ++h) {
        pages::Row& row = row_of(s, layer, h);
        for (int e = row.aside; e < row.sealed; ++e) {
            if (!far(row.page[e])) continue;
            pages::Pool& near = pools_[near_of(page_pool(row.page[e]))];
            const PageId to = near.take(pages::pool_of(pools_, row.page[e]).owner(row.page[e]));
            try {
                read_far(row.page[e], to);
            } catch (const MachineError& error) {
                near.release(to);
                throw MachineError(of_set(error.what(), row.set[e]));
            }
            pages::come_near(row, e, to);
            moved_bytes_ += near.page_bytes();
            ++misses_count_;
        }
    }
}

// Likewise: an error leaves those that were not written Near, out of sight all the same. What is written is clean for good, and
// may stay until its place is needed.
void Store::put_aside(int layer, SeqId seq, bool stay) {
    check_layer(layer, "put_aside");
    Sequence& s = find(seq, "put_aside");
    for (int h = 0; h < layers_[layer].kv_heads && !options_.far.empty(); ++h) {
        pages::Row& row = row_of(s, layer, h);
        for (int e = 0; e < row.aside; ++e) {
            if (!goes_far(row, e)) continue;
            if (row.back[e] == kNoPage) {
                pages::Pool& pool = pools_[far_of(layer, row.page[e])];
                const PageId to = pool.take(pages::pool_of(pools_, row.page[e]).owner(row.page[e]));
                try {
                    write_far(to, row.page[e]);
                } catch (...) {
                    pool.release(to);
                    throw;
                }
                moved_bytes_ += pool.page_bytes();
                row.back[e] = to;
            }
            if (!stay) pages::go_far(row, e, row.back[e], pools_);
        }
    }
}

// Near pages out of sight that are clean leave, those of one layer of one set: the set that a view named least lately, of its
// layers the last, as the first ones are read first. Nothing is written, so this cannot fail.
bool Store::give_way() {
    using Place = std::tuple<uint32_t, int, SeqId, pages::SetTag>;  // age of the set, layers from the end, whose it is
    const auto idle = [this](const pages::Row& row, int e) { return row.back[e] != kNoPage && goes_far(row, e); };
    const auto each = [&](auto see) {
        for (auto& [id, s] : sequences_) {
            for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
                for (int h = 0; h < layers_[l].kv_heads; ++h) {
                    pages::Row& row = row_of(*s, l, h);
                    for (int e = 0; e < row.aside; ++e) {
                        if (!idle(row, e)) continue;
                        const pages::SetTag set = pages::set_of(row.set[e]);
                        see(Place{set < s->routed.size() ? s->routed[set] : 0, -l, id, set}, row, e);
                    }
                }
            }
        }
    };
    if (!options_.sets || options_.far.empty()) return false;
    std::optional<Place> first;
    each([&](const Place& place, pages::Row&, int) { first = first ? std::min(*first, place) : place; });
    each([&](const Place& place, pages::Row& row, int e) {
        if (place == *first) pages::go_far(row, e, row.back[e], pools_);
    });
    return first.has_value();
}

// Whether a page of the Near tier has a place in the Far one.
bool Store::goes_far(const pages::Row& row, int entry) const {
    const Kind now = kinds_[page_pool(row.page[entry])];
    return now.tier == Tier::near &&
           std::find(options_.far.begin(), options_.far.end(), now.state) != options_.far.end();
}

int Store::far_of(int layer, PageId page) const { return pool_of(layer, state_of(page), Tier::far); }

void Store::look_sets(int layer, std::span<const SeqId> seqs, pages::SetTag* out, int64_t columns) {
    check_layer(layer, "look_sets");
    check(options_.sets, "look_sets: this store has no sets");
    const int heads = layers_[layer].kv_heads;
    std::fill_n(out, static_cast<int64_t>(seqs.size()) * heads * columns, pages::kBackbone);
    for (size_t b = 0; b < seqs.size(); ++b) {
        for (int h = 0; h < heads; ++h) {
            const pages::Row& row = row_of(find(seqs[b], "look_sets"), layer, h);
            check(row.stored <= columns, "look_sets: columns is ", columns, ", expected at least ", row.stored);
            pages::SetTag* to = out + (static_cast<int64_t>(b) * heads + h) * columns;
            for (int e = 0; e < row.entries(); ++e) to = std::fill_n(to, std::popcount(row.alive[e]), row.set[e]);
        }
    }
}

void Store::attend_beside(int layer, SeqId seq, std::span<const int32_t> positions, const AttendCall& call) {
    check_layer(layer, "attend_beside");
    const int n = static_cast<int>(positions.size());
    check(n >= 1, "attend_beside: positions is empty, expected one of each query");
    Sequence& s = find(seq, "attend_beside");
    const LayerShape& shape = layers_[layer];
    const int group = shape.q_heads / shape.kv_heads;
    const auto place = [&](const TokenTensor& t, DType dtype, int h) {
        return static_cast<unsigned char*>(t.data) + int64_t{h} * group * t.head * dtype_bytes(dtype);
    };
    attend_rows_.clear();
    for (int h = 0; h < shape.kv_heads; ++h) {
        ops::AttendRow r = attend_row(s, layer, h);
        r.q = place(call.q, options_.dtype, h);
        r.q_stride_t = call.q.token;
        r.q_stride_g = call.q.head;
        r.out = place(call.out, call.out_dtype, h);
        r.out_stride_t = call.out.token;
        r.out_stride_g = call.out.head;
        r.lse = reinterpret_cast<float*>(place(call.lse, DType::f32, h));
        r.lse_stride_t = call.lse.token;
        r.lse_stride_g = call.lse.head;
        r.q_pos = shape.window > 0 ? positions.data() : nullptr;
        r.queries = n;
        attend_rows_.push_back(r);
    }
    attend_now(layer, call, call.out_dtype);
    settle_workspace(n);
}

}  // namespace kvstrata::store
