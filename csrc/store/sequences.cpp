// Sequences of a store: made, shared, cropped, freed.
#include <algorithm>

#include "common/check.h"
#include "store/store.h"

namespace kvstrata::store {

Sequence& Store::find(SeqId seq, const char* verb) {
    auto at = sequences_.find(seq);
    check(at != sequences_.end(), verb, ": sequence ", seq, " does not exist, or was freed");
    return *at->second;
}

const Sequence& Store::sequence(SeqId seq) const { return const_cast<Store*>(this)->find(seq, "sequence"); }

void Store::check_layer(int layer, const char* verb) const {
    check(layer >= 0 && layer < static_cast<int>(layers_.size()), verb, ": layer is ", layer, ", expected 0..",
          layers_.size() - 1);
}

const pages::Row& Store::row(SeqId seq, int layer, int head) const {
    const Sequence& s = sequence(seq);
    check_layer(layer, "row");
    check(head >= 0 && head < layers_[layer].kv_heads, "row: head is ", head, ", expected 0..",
          layers_[layer].kv_heads - 1);
    return s.rows[first_row_[layer] + head];
}

Sequence Store::blank() {
    Sequence s;
    s.rows.resize(n_rows_);
    for (pages::Row& row : s.rows) {
        row.noted = options_.scored;
        row.tagged = options_.sets;
    }
    if (!options_.formats.empty()) s.centres.resize(n_rows_);
    s.rings = rings();
    for (size_t l = 0; l < layers_.size() && options_.recall.pages > 0; ++l) {
        for (int h = 0; h < layers_[l].kv_heads; ++h) s.indices.emplace_back(layers_[l].head_dim, options_.recall.kind);
    }
    return s;
}

// Empty ones, by layer; none where no queries are remembered.
std::vector<QueryRing> Store::rings() {
    std::vector<QueryRing> out;
    for (const LayerShape& l : layers_) {
        if (options_.queries > 0)
            out.emplace_back(options_.queries, l.q_heads, l.head_dim * dtype_bytes(options_.dtype), mirror_);
    }
    return out;
}

std::vector<SeqId> Store::create(int n) {
    check(n >= 1, "create: n is ", n, ", expected >= 1");
    std::vector<SeqId> ids;
    for (int i = 0; i < n; ++i) {
        sequences_.emplace(next_, std::make_unique<Sequence>(blank()));
        sequences_[next_]->owner = next_owner_++;
        ids.push_back(next_++);
    }
    return ids;
}

void Store::release(Sequence& s) {
    for (size_t l = 0; l < layers_.size(); ++l) {
        for (int h = 0; h < layers_[l].kv_heads; ++h) {
            pages::release(row_of(s, l, h), pools_);
            if (mirror_.on()) mirror_.leave(row_of(s, l, h));
        }
    }
    for (Centre& c : s.centres) c = {};
    for (Index& index : s.indices) index.truncate(0);
    for (QueryRing& ring : s.rings) ring.clear();
    s.sought.clear();
}

void Store::check_sequences(std::span<const SeqId> seqs, const char* verb) {
    std::vector<SeqId> sorted(seqs.begin(), seqs.end());
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    check(twice == sorted.end(), verb, ": sequence ", twice == sorted.end() ? 0 : *twice, " is named twice");
    for (SeqId id : seqs) find(id, verb);
}

void Store::free(std::span<const SeqId> seqs) {
    check(!open_, "free: a step is open, expected none");
    check_sequences(seqs, "free");
    for (SeqId id : seqs) {
        end_ahead(id);
        release(find(id, "free"));
        sequences_.erase(id);
    }
}

Sequence Store::clone(const Sequence& s) {
    Sequence copy{s.length, s.confirmed, s.floor, {}, s.centres, s.rings, s.indices, s.view, s.sought};
    copy.routed = s.routed;
    copy.rows.reserve(n_rows_);
    for (const pages::Row& row : s.rows) copy.rows.push_back(pages::share(row, pools_));
    copy.owner = next_owner_++;
    return copy;
}

std::vector<SeqId> Store::fork(SeqId parent, int n) {
    check(!open_, "fork: a step is open, expected none");
    check(n >= 1, "fork: n is ", n, ", expected >= 1");
    const Sequence& source = find(parent, "fork");
    std::vector<SeqId> ids;
    for (int i = 0; i < n; ++i) {
        sequences_.emplace(next_, std::make_unique<Sequence>(clone(source)));
        ids.push_back(next_++);
    }
    return ids;
}

// Result i continues seqs[index[i]]; the given sequences end. The last use of a source takes its rows over, earlier ones
// share them, so all references are added before any is dropped.
std::vector<SeqId> Store::select(std::span<const SeqId> seqs, std::span<const int64_t> index) {
    check(!open_, "select: a step is open, expected none");
    check_sequences(seqs, "select");
    const int64_t n = static_cast<int64_t>(seqs.size());
    std::vector<int64_t> uses(n, 0);
    for (int64_t i : index) {
        check(i >= 0 && i < n, "select: index has ", i, ", expected 0..", n - 1);
        ++uses[i];
    }
    std::vector<SeqId> ids;
    for (int64_t i : index) {
        auto at = sequences_.find(seqs[i]);
        if (--uses[i] == 0) {
            auto whole = std::move(at->second);
            at->second = std::make_unique<Sequence>(blank());
            sequences_.emplace(next_, std::move(whole));
        } else {
            sequences_.emplace(next_, std::make_unique<Sequence>(clone(*at->second)));
        }
        ids.push_back(next_++);
    }
    free(seqs);
    return ids;
}

// A row and its index.
void Store::crop_row(Sequence& s, int layer, int head, int64_t length) {
    pages::Row& row = row_of(s, layer, head);
    if (!recalls(layer)) {
        pages::crop(row, length, pools_);
        pages::reopen(row, length - options_.tail, pools_);
        return;
    }
    std::vector<int32_t> kept;
    const std::vector<uint16_t> before = row.visible;
    pages::crop(row, length, pools_, &kept);
    Index& index = s.indices[first_row_[layer] + head];
    while (!kept.empty() && kept.back() >= index.count()) kept.pop_back();
    index.keep(kept);
    for (size_t e = 0; e < kept.size(); ++e) {
        if (before[kept[e]] != row.visible[e]) index.narrowed(static_cast<int>(e));
    }
    summarize_groups(s, layer, head);
}

void Store::crop(SeqId seq, int64_t length) {
    check(!open_, "crop: a step is open, expected none");
    Sequence& s = find(seq, "crop");
    check(length >= 0 && length <= s.length, "crop: length is ", length, ", expected 0..", s.length);
    check(length >= s.floor, "crop: length is ", length, ", expected at least ", s.floor,
          ": older tokens were dropped when the sequence was that long");
    for (size_t l = 0; l < layers_.size(); ++l) {
        for (int h = 0; h < layers_[l].kv_heads; ++h) {
            crop_row(s, static_cast<int>(l), h, length);
        }
    }
    for (QueryRing& ring : s.rings) ring.drop_last(s.length - length);
    s.length = length;
    s.confirmed = length;
}

void Store::confirm(SeqId seq) {
    Sequence& s = find(seq, "confirm");
    s.confirmed = s.length;
}

void Store::clear(SeqId seq) {
    check(!open_, "clear: a step is open, expected none");
    Sequence& s = find(seq, "clear");
    end_ahead(seq);
    release(s);
    s.length = s.confirmed = s.floor = 0;
    s.view = {};
    s.routed.clear();
}

}  // namespace kvstrata::store
