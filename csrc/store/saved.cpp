// Rows as they are kept elsewhere: pages copied out, and put back into a sequence that is empty.
//
// What is put back comes from outside and is checked: an error changes nothing. Pages are taken from those that are free.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/layout.h"
#include "ops/compact.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

bool is_tag(pages::SetTag tag) {
    return tag == pages::kBackbone || tag == pages::kPending || pages::set_of(tag) != pages::kBackbone;
}

// Positions of the alive slots of an entry, in slot order.
template <class See>
void each_position(const SavedRow& saved, size_t entry, See see) {
    const int32_t* const at = saved.positions + entry * kSlots;
    for (uint16_t m = saved.alive[entry]; m; m &= m - 1) see(at[std::countr_zero(m)]);
}

}  // namespace

// Pages of one state, of either tier, [entries, page bytes], 64-byte aligned, and positions [entries, 16]. Slots that hold no token are zeros, at
// position -1: what stood in them goes nowhere.
void Store::copy_out(SeqId seq, int layer, int head, std::span<const int32_t> entries, unsigned char* payload,
                     int32_t* positions) {
    const pages::Row& r = row(seq, layer, head);
    if (entries.empty()) return;
    if (mirror_.on()) throw Unsupported("copy_out: pages are on a CUDA device, expected the CPU");
    check(entries.size() <= static_cast<size_t>(kMaxPagesPerSlab), "copy_out: ", entries.size(),
          " entries, expected at most ", kMaxPagesPerSlab);
    for (int32_t e : entries) {
        check(e >= 0 && e < r.entries(), "copy_out: entry is ", e, ", expected 0..", r.entries() - 1);
        check(state_of(r.page[e]) == state_of(r.page[entries[0]]), "copy_out: entry ", e, " is of state ",
              static_cast<int>(state_of(r.page[e])), ", expected all of one");
    }
    const int pool = page_pool(r.page[entries[0]]), out = (pool + 1) % kMaxPools;
    PoolView views_[kMaxPools];
    views(views_);
    views_[out] = {info_[pool].format, 1, info_[pool].page_bytes, &payload, &positions};
    std::memset(payload, 0, entries.size() * info_[pool].page_bytes);
    std::fill_n(positions, entries.size() * kSlots, -1);
    for (size_t i = 0; i < entries.size(); ++i) {
        PageId from = r.page[entries[i]];
        if (far(from)) {
            const PageId stage = ring_of(page_pool(from))[0];
            read_far(from, stage);
            from = stage;
        }
        ops::Move moves[kSlots];
        int n = 0;
        for (uint16_t m = r.alive[entries[i]]; m; m &= m - 1) {
            const int slot = std::countr_zero(m);
            moves[n++] = {from, slot, make_page(out, 0, static_cast<int>(i)), slot};
        }
        ops::compact({moves, n, info_[pool].head_dim, views_, 1});
    }
}

Centre Store::centre_of(SeqId seq, int layer, int head) const {
    row(seq, layer, head);  // is there one?
    const Sequence& s = sequence(seq);
    return s.centres.empty() ? Centre{} : s.centres[first_row_[layer] + head];
}

void Store::check_saved(int layer, const SavedRow& saved) const {
    const int32_t n = static_cast<int32_t>(saved.pool.size());
    check(static_cast<int32_t>(saved.alive.size()) == n && saved.set.size() == (options_.sets ? saved.pool.size() : 0),
          "restore_row: ", n, " pools, ", saved.alive.size(), " masks, ", saved.set.size(), " sets, expected as many");
    check(saved.page.empty() || saved.page.size() == saved.pool.size(), "restore_row: ", saved.page.size(),
          " pages, expected none or ", n);
    check(saved.sealed >= 0 && saved.sealed <= n, "restore_row: sealed is ", saved.sealed, ", expected 0..", n);
    int64_t bytes = 0;
    int32_t last = -1;  // of the open tail
    std::vector<int32_t> seen;
    for (int32_t e = 0; e < n; ++e) {
        const int pool = saved.pool[e];
        const bool open = e >= saved.sealed;
        const bool fits =
            pool >= 0 && pool < n_pools() && pool_of(layer, kinds_[pool].state, kinds_[pool].tier) == pool;
        check(fits && (!open || pool == pool_of(layer)), "restore_row: entry ", e, " is of pool ", pool,
              ", expected one of layer ", layer, open ? ", of full pages" : "");
        check(saved.alive[e] != 0, "restore_row: entry ", e, " holds no token");
        if (options_.sets) {
            check(is_tag(saved.set[e]) && (!open || saved.set[e] == pages::kPending), "restore_row: entry ", e,
                  " is of set ", saved.set[e], open ? ", expected 65535 in the open tail" : ", expected a set");
        }
        each_position(saved, e, [&](int32_t position) {
            check(position > (open ? last : -1), "restore_row: entry ", e, " has position ", position,
                  ", expected at least 0, rising in the open tail");
            if (open) last = position;
            seen.push_back(position);
        });
        check(saved.page.empty() || saved.page[e] == kNoPage || page_pool(saved.page[e]) == pool, "restore_row: entry ",
              e, " has a page of another pool than ", pool);
        if (!saved.lies(e)) bytes += info_[pool].page_bytes;
    }
    check(saved.payload_bytes == bytes, "restore_row: payload has ", saved.payload_bytes, " bytes, expected ", bytes);
    std::sort(seen.begin(), seen.end());
    const auto twice = std::adjacent_find(seen.begin(), seen.end());
    check(twice == seen.end(), "restore_row: position ", twice == seen.end() ? 0 : *twice, " is there twice");
    const bool centred = std::all_of(saved.mean.begin(), saved.mean.end(), [](float x) { return std::isfinite(x); });
    check(!saved.frozen || !options_.formats.empty(), "restore_row: a centre, expected none without quantized formats");
    check(saved.mean.empty() ||
              (saved.frozen && centred && static_cast<int>(saved.mean.size()) == layers_[layer].head_dim),
          "restore_row: the centre has ", saved.mean.size(), " means, expected ", layers_[layer].head_dim,
          " finite ones of a frozen one, or none");
}

void Store::restore_row(SeqId seq, int layer, int head, const SavedRow& saved) {
    if (mirror_.on()) throw Unsupported("restore_row: pages are on a CUDA device, expected the CPU");
    check(!open_, "restore_row: a step is open, expected none");
    Sequence& s = find(seq, "restore_row");
    check_layer(layer, "restore_row");
    check(head >= 0 && head < layers_[layer].kv_heads, "restore_row: head is ", head, ", expected 0..",
          layers_[layer].kv_heads - 1);
    const bool plain = !options_.massed && options_.queries == 0 && options_.recall.pages == 0;
    check(plain && (options_.sets || options_.far.empty()),
          "restore_row: this store keeps mass, queries or summaries beside its rows");
    pages::Row& row = row_of(s, layer, head);
    check(s.length == 0 && row.entries() == 0, "restore_row: layer ", layer, ", head ", head,
          " holds tokens, expected none");
    check_saved(layer, saved);
    int64_t need[kMaxPools] = {};
    for (size_t e = 0; e < saved.pool.size(); ++e) need[saved.pool[e]] += !saved.lies(e);
    for (int p = 0; p < n_pools(); ++p) {
        if (need[p] <= pools_[p].free()) continue;
        throw std::logic_error(message("restore_row: needs ", need[p], " pages of pool ", p, ", ", pools_[p].free(),
                                       " are free; they were not reserved"));
    }
    std::vector<pages::Fresh> fresh;
    try {
        const unsigned char* from = saved.payload;
        for (size_t e = 0; e < saved.pool.size(); ++e) {
            pages::Pool& pool = pools_[saved.pool[e]];
            const PageId lies = saved.lies(e) ? saved.page[e] : kNoPage;
            const PageId page =
                lies == kNoPage ? pool.take(s.owner) : pool.take(page_slab(lies), page_index(lies), s.owner);
            fresh.push_back({page, saved.alive[e], 0, {}, options_.sets ? saved.set[e] : pages::kBackbone});
            if (lies != kNoPage) continue;
            if (far(page)) {
                far_[saved.pool[e]].write(page, from);
            } else {
                std::memcpy(pool.payload(page), from, pool.page_bytes());
            }
            std::memcpy(pool.positions(page), saved.positions + e * kSlots, kPositionBytes);
            from += pool.page_bytes();
        }
    } catch (...) {
        for (const pages::Fresh& f : fresh) pages::pool_of(pools_, f.page).release(f.page);
        throw;
    }
    if (saved.frozen) {
        Centre& centre = s.centres[first_row_[layer] + head];
        if (!saved.mean.empty()) {
            centre.mean = std::make_shared<const std::vector<float>>(saved.mean.begin(), saved.mean.end());
        }
        centre.frozen = true;
    }
    pages::replace(row, {}, fresh, pools_);
    row.sealed = saved.sealed;
}

void Store::restore_length(SeqId seq, int64_t length, int64_t floor) {
    check(!open_, "restore_length: a step is open, expected none");
    Sequence& s = find(seq, "restore_length");
    check(s.length == 0, "restore_length: the sequence has ", s.length, " tokens, expected none");
    check(length >= 0 && length <= INT32_MAX, "restore_length: length is ", length, ", expected 0..", INT32_MAX);
    check(floor >= 0 && floor <= length, "restore_length: floor is ", floor, ", expected 0..", length);
    std::vector<int32_t> at;
    for (const pages::Row& row : s.rows) {
        at.resize(row.stored);
        pages::positions(row, pools_, at.data());
        const auto last = std::max_element(at.begin(), at.end());
        check(last == at.end() || *last < length, "restore_length: a row has position ", last == at.end() ? 0 : *last,
              ", expected below the length of ", length);
    }
    s.length = s.confirmed = length;
    s.floor = floor;
    for (pages::Row& row : s.rows) pages::arrange(row, s.view);
}

}  // namespace kvstrata::store
