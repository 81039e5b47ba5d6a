// Pages of sets that are fetched while the layers before theirs are at work: one delivery for each layer of a view.
#include <algorithm>

#include "common/check.h"
#include "store/store.h"

namespace kvstrata::store {

// The pages must be free. Tables change as the delivery lands.
void Store::bring_ahead(int layer, SeqId seq) {
    check_layer(layer, "bring_ahead");
    Sequence& s = find(seq, "bring_ahead");
    drop_ended();
    const std::vector<int64_t> need = moving(layer, seq);
    for (int p = 0; p < n_pools(); ++p) {
        if (info_[p].tier == Tier::far || need[p] <= pools_[p].free()) continue;
        throw std::logic_error(message("bring_ahead: layer ", layer, " needs ", need[p], " pages of pool ", p, ", ",
                                       pools_[p].free(), " are free; they were not reserved"));
    }
    auto delivery = std::make_shared<Delivery>();
    delivery->seq = seq;
    delivery->layer = layer;
    int64_t count = 0;
    for (int p = 0; p < n_pools(); ++p) count += info_[p].tier == Tier::near ? need[p] : 0;
    if (count == 0) return;
    delivery->fetches.reserve(count);
    deliveries_.reserve(deliveries_.size() + 1);
    for (int h = 0; h < layers_[layer].kv_heads; ++h) {
        const pages::Row& row = row_of(s, layer, h);
        for (int e = row.aside; e < row.sealed; ++e) {
            const PageId from = row.page[e];
            if (!far(from)) continue;
            pages::Pool& near = pools_[near_of(page_pool(from))];
            const PageId to = near.take(pages::pool_of(pools_, from).owner(from));
            pools_[page_pool(from)].share(from);
            delivery->fetches.push_back({far_[page_pool(from)].at(from), near.payload(to), from, to, row.set[e]});
        }
    }
    std::sort(delivery->fetches.begin(), delivery->fetches.end(),
              [](const Fetch& a, const Fetch& b) { return a.far < b.far; });
    deliveries_.push_back(delivery);
    reader_.begin(std::move(delivery));
}

void Store::land(int layer, SeqId seq) {
    const auto mine = [&](const auto& t) { return t->seq == seq && t->layer == layer && !t->late; };
    const auto at = std::find_if(deliveries_.begin(), deliveries_.end(), mine);
    if (at == deliveries_.end()) return;
    Sequence& s = find(seq, "land");
    Delivery& delivery = **at;
    if (!reader_.wait(delivery)) {
        delivery.late = s.unread = true;
        throw MachineError(message("far tier: ", delivery.fetches.size(), " pages of layer ", layer,
                                   " have not been read within ", reader_.patience, " seconds"));
    }
    const std::shared_ptr<Delivery> held = *at;
    deliveries_.erase(at);
    if (held->error.empty()) return take_in(*held);
    s.unread = true;
    let_go(*held);
    throw MachineError(held->error);
}

void Store::end_ahead(SeqId seq) {
    for (const auto& delivery : std::vector<std::shared_ptr<Delivery>>(deliveries_)) {
        if (delivery->seq != seq || delivery->late) continue;
        if (!reader_.wait(*delivery)) {
            delivery->late = true;
            continue;
        }
        deliveries_.erase(std::find(deliveries_.begin(), deliveries_.end(), delivery));
        delivery->error.empty() ? take_in(*delivery) : let_go(*delivery);
    }
    drop_ended();
}

bool Store::ahead(SeqId seq) const {
    return std::any_of(deliveries_.begin(), deliveries_.end(),
                       [&](const auto& t) { return t->seq == seq && !t->late; });
}

// Entries that still hold the Far pages get the Near ones; what no entry asks for any more is let go.
void Store::take_in(Delivery& delivery) {
    Sequence& s = find(delivery.seq, "land");
    for (int h = 0; h < layers_[delivery.layer].kv_heads; ++h) {
        pages::Row& row = row_of(s, delivery.layer, h);
        for (int e = 0; e < row.sealed; ++e) {
            const auto at = std::lower_bound(delivery.fetches.begin(), delivery.fetches.end(), row.page[e],
                                             [](const Fetch& f, PageId page) { return f.far < page; });
            if (at == delivery.fetches.end() || at->far != row.page[e] || at->near == kNoPage) continue;
            pages::Pool& near = pages::pool_of(pools_, at->near);
            std::copy_n(pages::pool_of(pools_, at->far).positions(at->far), kSlots, near.positions(at->near));
            pages::come_near(row, e, at->near);
            at->near = kNoPage;
            moved_bytes_ += near.page_bytes();
            ++misses_count_;
        }
    }
    let_go(delivery);
}

void Store::let_go(Delivery& delivery) {
    for (const Fetch& f : delivery.fetches) {
        pages::pool_of(pools_, f.far).release(f.far);
        if (f.near != kNoPage) pages::pool_of(pools_, f.near).release(f.near);
    }
    delivery.fetches.clear();
}

// Deliveries that nobody waits for, once their reads have ended.
void Store::drop_ended() {
    std::erase_if(deliveries_, [&](const auto& delivery) {
        if (!delivery->late || !reader_.ended(*delivery)) return false;
        let_go(*delivery);
        return true;
    });
}

// Waits until nothing is read into a slab any more; false where that does not end.
bool Store::land_reads(int pool, int slab) {
    drop_ended();
    return std::all_of(deliveries_.begin(), deliveries_.end(), [&](const auto& delivery) {
        const bool there = std::any_of(delivery->fetches.begin(), delivery->fetches.end(), [&](const Fetch& f) {
            return page_pool(f.near) == pool && page_slab(f.near) == slab;
        });
        return !there || (delivery->late ? reader_.ended(*delivery) : reader_.wait(*delivery));
    });
}

}  // namespace kvstrata::store
