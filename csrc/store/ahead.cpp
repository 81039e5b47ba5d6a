// Pages of sets that are fetched while the layers before theirs are at work: one delivery for each layer of a view.
#include <algorithm>
#include <utility>

#include "common/check.h"
#include "common/fault.h"
#include "store/store.h"

namespace kvstrata::store {

// The pages must be free. Tables change as the delivery lands.
void Store::bring_ahead(int layer, SeqId seq) {
    check_layer(layer, "bring_ahead");
    Sequence& s = find(seq, "bring_ahead");
    const std::vector<int64_t> need = moving(layer, seq);
    for (int p = 0; p < n_pools(); ++p) {
        if (info_[p].tier == Tier::far || need[p] <= pools_[p].free()) continue;
        throw std::logic_error(message("bring_ahead: layer ", layer, " needs ", need[p], " pages of pool ", p, ", ",
                                       pools_[p].free(), " are free; they were not reserved"));
    }
    int64_t count = 0;
    for (int p = 0; p < n_pools(); ++p) count += info_[p].tier == Tier::near ? need[p] : 0;
    if (count == 0) return;
    Copier& copier = this->copier();
    std::vector<Fetch> fetches;
    std::vector<Copy> copies;
    fetches.reserve(count), copies.reserve(count);
    deliveries_.reserve(deliveries_.size() + 1);
    for (int h = 0; h < layers_[layer].kv_heads; ++h) {
        const pages::Row& row = row_of(s, layer, h);
        for (int e = row.aside; e < row.sealed; ++e) {
            if (far(row.page[e])) fetches.push_back({{}, row.page[e], kNoPage, row.set[e]});
        }
    }
    std::sort(fetches.begin(), fetches.end(), [](const Fetch& a, const Fetch& b) { return a.far < b.far; });
    for (Fetch& f : fetches) {
        pages::Pool &from = pages::pool_of(pools_, f.far), &near = pools_[near_of(page_pool(f.far))];
        f.near = near.take(from.owner(f.far));
        from.share(f.far);
        copies.push_back({far_[page_pool(f.far)].at(f.far), near.payload(f.near), &f.ticket});
    }
    deliveries_.push_back({seq, layer, std::move(fetches)});
    try {
        copier.ask(copies);
    } catch (...) {
        give_up(seq);
        throw;
    }
}

void Store::land(int layer, SeqId seq) {
    const auto at = std::find_if(deliveries_.begin(), deliveries_.end(),
                                 [&](const Delivery& d) { return d.seq == seq && d.layer == layer; });
    if (at == deliveries_.end()) return;
    const bool late = !ahead_.copier->wait(at->fetches.back().ticket);  // mostly the last to come
    for (Fetch& f : at->fetches) {
        try {
            fault::hit("far.read");
            ahead_.copier->take(std::exchange(f.ticket, {}), late);
        } catch (const MachineError& error) {
            const std::string failed = of_set(error.what(), f.set);
            give_up(seq);
            throw MachineError(failed);
        }
    }
    take_in(*at);
    deliveries_.erase(at);
}

void Store::end_ahead(SeqId seq) {
    try {
        for (int l = 0; l < static_cast<int>(layers_.size()); ++l) land(l, seq);
    } catch (const MachineError&) {  // which gave up the layers behind it
    }
}

bool Store::ahead(SeqId seq) const {
    return std::any_of(deliveries_.begin(), deliveries_.end(), [&](const Delivery& d) { return d.seq == seq; });
}

void Store::stop_reading() {
    while (!deliveries_.empty()) give_up(deliveries_.back().seq);
}

void Store::give_up(SeqId seq) {
    std::erase_if(deliveries_, [&](Delivery& delivery) {
        if (delivery.seq != seq) return false;
        let_go(delivery);
        return true;
    });
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
        ahead_.copier->give_up(f.ticket);
        pages::pool_of(pools_, f.far).release(f.far);
        if (f.near != kNoPage) pages::pool_of(pools_, f.near).release(f.near);
    }
}

std::string of_set(const char* error, pages::SetTag set) {
    return message(error, ", where a page of set ", pages::set_of(set), " was read");
}

}  // namespace kvstrata::store
