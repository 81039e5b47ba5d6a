// What a policy sees of a store: the stored tokens of a layer's rows in table order.
#include <algorithm>
#include <bit>
#include <utility>

#include "common/check.h"
#include "common/layout.h"
#include "ops/quantize.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

// 0: no plan has put the page together, 1: for the time being, 2: for good.
uint8_t grouping(uint8_t want) { return want & pages::kGrouped ? 2 : want & pages::kProvisional ? 1 : 0; }

}  // namespace

int64_t Store::columns(int layer, std::span<const SeqId> seqs) {
    check_layer(layer, "columns");
    int64_t most = 0;
    for (SeqId id : seqs) {
        Sequence& s = find(id, "columns");
        for (int h = 0; h < layers_[layer].kv_heads; ++h) most = std::max<int64_t>(most, row_of(s, layer, h).stored);
    }
    return most;
}

void Store::look(int layer, std::span<const SeqId> seqs, const Look& out, int64_t columns) {
    check_layer(layer, "look");
    const int heads = layers_[layer].kv_heads;
    const int64_t all = static_cast<int64_t>(seqs.size()) * heads * columns;
    if (out.positions) std::fill_n(out.positions, all, -1);
    if (out.open) std::fill_n(out.open, all, uint8_t{0});
    if (out.state) std::fill_n(out.state, all, uint8_t{0});
    if (out.scores) std::fill_n(out.scores, all, 0.0f);
    if (out.tier) std::fill_n(out.tier, all, uint8_t{0});
    if (out.grouped) std::fill_n(out.grouped, all, uint8_t{0});
    if (out.entry) std::fill_n(out.entry, all, -1);
    for (size_t b = 0; b < seqs.size(); ++b) {
        for (int h = 0; h < heads; ++h) {
            const pages::Row& row = row_of(find(seqs[b], "look"), layer, h);
            check(row.stored <= columns, "look: columns is ", columns, ", expected at least ", row.stored);
            int64_t at = (static_cast<int64_t>(b) * heads + h) * columns;
            if (out.positions) pages::positions(row, pools_, out.positions + at);
            for (int e = 0; e < row.entries(); ++e) {
                const int n = std::popcount(row.alive[e]);
                if (out.open) std::fill_n(out.open + at, n, uint8_t{e >= row.sealed});
                if (out.state) std::fill_n(out.state + at, n, static_cast<uint8_t>(state_of(row.page[e])));
                if (out.tier) std::fill_n(out.tier + at, n, static_cast<uint8_t>(kinds_[page_pool(row.page[e])].tier));
                if (out.grouped) std::fill_n(out.grouped + at, n, grouping(row.want[e]));
                if (out.entry) std::fill_n(out.entry + at, n, e);
                int i = 0;
                for (uint16_t m = row.alive[e]; out.scores && row.noted && m; m &= m - 1, ++i) {
                    out.scores[at + i] =
                        std::bit_cast<float>(row.note[static_cast<size_t>(e) * kSlots + std::countr_zero(m)]);
                }
                at += n;
            }
        }
    }
}

Tally Store::tally(int layer, std::span<const SeqId> seqs) {
    check_layer(layer, "tally");
    Tally found;
    int64_t slots[kMaxPools] = {};
    for (SeqId id : seqs) {
        Sequence& s = find(id, "tally");
        for (int h = 0; h < layers_[layer].kv_heads; ++h) {
            const pages::Row& row = row_of(s, layer, h);
            found.entries += row.entries();
            int pool = 0;
            int64_t run = 0;  // slots of entries in one pool, as most are that stand together
            for (int e = 0; e < row.entries(); ++e) {
                if (const int of = page_pool(row.page[e]); of != pool) {
                    slots[pool] += std::exchange(run, 0);
                    pool = of;
                }
                run += row.alive[e] == kAllSlots ? kSlots : std::popcount(row.alive[e]);  // most pages are whole
            }
            slots[pool] += run;
        }
    }
    for (size_t p = 0; p < pools_.size(); ++p) {
        found.slots[static_cast<int>(kinds_[p].state)] += slots[p];
        if (kinds_[p].tier == Tier::far) found.far += slots[p];
    }
    return found;
}

void Store::set_scores(int layer, std::span<const SeqId> seqs, const float* scores, int64_t columns) {
    check_layer(layer, "set_scores");
    check(options_.scored, "set_scores: this store keeps no scores");
    const int heads = layers_[layer].kv_heads;
    for (size_t b = 0; b < seqs.size(); ++b) {
        for (int h = 0; h < heads; ++h) {
            pages::Row& row = row_of(find(seqs[b], "set_scores"), layer, h);
            check(row.stored <= columns, "set_scores: columns is ", columns, ", expected at least ", row.stored);
            const float* from = scores + (static_cast<int64_t>(b) * heads + h) * columns;
            for (int e = 0; e < row.entries(); ++e) {
                for (uint16_t m = row.alive[e]; m; m &= m - 1) {
                    row.note[static_cast<size_t>(e) * kSlots + std::countr_zero(m)] = std::bit_cast<uint32_t>(*from++);
                }
            }
        }
    }
}

void Store::positions(SeqId seq, int layer, int head, int32_t* out) {
    pages::positions(row(seq, layer, head), pools_, out);
}

// Pages of any format as f32 [n, 16, D] of the CPU; mean: of the row, where ops run, or null.
void Store::decode(std::span<const PageId> pages, const float* mean, int dim, float* k, float* v) {
    const std::vector<int32_t> rows(mean ? pages.size() : 0, 0);
    const std::span<const int32_t> all(rows);
    const auto n = static_cast<int32_t>(pages.size());
    PoolView pools[kMaxPools];
    if (!mirror_.on()) {
        views(pools);
        return ops::dequantize({pages.data(), mean, mean ? rows.data() : nullptr, n, dim, k, v, pools, 1});
    }
    const auto bytes = static_cast<int64_t>(pages.size()) * kSlots * dim * int64_t{sizeof(float)};
    auto* const there = reinterpret_cast<float*>(mirror_.workspace(2 * bytes));
    float* const v_there = there + bytes / sizeof(float);
    mirror_.begin_lists(Mirror::list_bytes(pages) + Mirror::list_bytes(all));
    const PageId* const ids = mirror_.list(pages);
    const int32_t* const row_of = mean ? mirror_.list(all) : nullptr;
    views(pools);
    ops::dequantize({ids, mean, row_of, n, dim, there, v_there, pools, 1}, mirror_.where);
    ops::download(k, there, bytes, mirror_.where);
    ops::download(v, v_there, bytes, mirror_.where);
}

void Store::read(SeqId seq, int layer, int head, float* k, float* v) {
    const pages::Row& r = row(seq, layer, head);
    const int dim = layers_[layer].head_dim;
    std::vector<float> page_k(static_cast<size_t>(kSlots) * dim), page_v(page_k.size());
    const float* const mean = centre(sequence(seq), layer, head);
    for (int e = 0; e < r.entries(); ++e) {
        PageId page = r.page[e];
        if (far(page)) {
            const PageId copy = ring_of(page_pool(page))[0];
            read_far(page, copy);
            page = copy;
        }
        decode({&page, 1}, mean, dim, page_k.data(), page_v.data());
        for (uint16_t m = r.alive[e]; m; m &= m - 1, k += dim, v += dim) {
            const int slot = std::countr_zero(m);
            std::copy_n(&page_k[static_cast<size_t>(slot) * dim], dim, k);
            std::copy_n(&page_v[static_cast<size_t>(slot) * dim], dim, v);
        }
    }
}

}  // namespace kvstrata::store
