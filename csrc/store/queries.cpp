#include "store/queries.h"

#include <algorithm>

#include "common/check.h"
#include "store/store.h"

namespace kvstrata::store {

void QueryRing::clear() {
    first_ = count_ = 0;
    data_.reset();
}

void QueryRing::advance() {
    if (!data_) {
        data_ = mirror_->shared(size());
    } else if (data_.use_count() > 1) {
        const std::shared_ptr<unsigned char> own = mirror_->shared(size());
        ops::copy({own.get(), size(), data_.get(), size(), size(), 1}, mirror_->where);
        data_ = own;
    }
    if (count_ < capacity_) {
        ++count_;
    } else {
        first_ = (first_ + 1) % capacity_;
    }
}

void QueryRing::join(const QueryRing& later) {
    for (int i = 0; i < later.count_; ++i) {
        advance();
        const int64_t bytes = int64_t{heads_} * vector_bytes_;
        ops::copy({slot(0), bytes, later.slot(0, i), bytes, bytes, 1}, mirror_->where);
    }
}

void QueryRing::gather(void* out) const {
    for (int i = 0; i < count_; ++i) {
        ops::copy({static_cast<unsigned char*>(out) + int64_t{i} * vector_bytes_, int64_t{count_} * vector_bytes_,
                   slot(0, i), vector_bytes_, vector_bytes_, heads_},
                  mirror_->where);
    }
}

// Keeps the last queries of the step's sequences in one layer aside.
void Store::stage_queries(int layer, const TokenTensor& q) {
    const LayerShape& shape = layers_[layer];
    if (options_.queries == 0 || shape.window > 0) return;
    const int64_t width = dtype_bytes(options_.dtype), vector = shape.head_dim * width;
    for (size_t b = 0; b < step_.size(); ++b) {
        const StepSequence& s = step_[b];
        QueryRing& ring = staged_[b * layers_.size() + layer];
        const int capacity = std::min(options_.queries, std::max(s.count, 1));
        if (ring.capacity() != capacity) ring = QueryRing(capacity, shape.q_heads, static_cast<int>(vector), mirror_);
        ring.restart();
        for (int32_t t = std::max(0, s.count - options_.queries); t < s.count; ++t) {
            ring.advance();
            const int64_t element = static_cast<int64_t>(b) * q.batch + tokens_[s.first + t] * q.token;
            ops::copy({ring.slot(0), vector, static_cast<const unsigned char*>(q.data) + element * width,
                       q.head * width, vector, shape.q_heads},
                      mirror_.where);
        }
    }
}

// The last queries of a layer; those of an open step count where the layer has its tokens.
QueryRing Store::last_queries(int layer, SeqId seq) const {
    const Sequence& s = sequence(seq);
    if (s.rings.empty() || layers_[layer].window > 0) return {};
    QueryRing whole = s.rings[layer];
    for (size_t b = 0; open_ && b < step_.size(); ++b) {
        if (step_[b].sequence == &s && done_[layer] > 0) whole.join(staged_[b * layers_.size() + layer]);
    }
    return whole;
}

// out [Hq, count, D] of the cache's dtype, count <= W, of the CPU, or null: only the count.
int Store::queries(int layer, SeqId seq, void* out) {
    check_layer(layer, "queries");
    const QueryRing last = last_queries(layer, seq);
    if (!out || !last.count()) return last.count();
    const LayerShape& shape = layers_[layer];
    const int64_t bytes = int64_t{last.count()} * shape.q_heads * shape.head_dim * dtype_bytes(options_.dtype);
    void* const there = mirror_.on() ? mirror_.workspace(bytes) : out;
    last.gather(there);
    if (mirror_.on()) ops::download(out, there, bytes, mirror_.where);
    return last.count();
}

}  // namespace kvstrata::store
