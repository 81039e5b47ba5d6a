#include "store/queries.h"

#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "store/store.h"

namespace kvstrata::store {

void QueryRing::clear() {
    first_ = count_ = 0;
    data_.reset();
}

void QueryRing::advance() {
    const size_t size = static_cast<size_t>(capacity_) * heads_ * vector_bytes_;
    if (!data_) {
        data_ = std::make_shared<std::vector<unsigned char>>(size);
    } else if (data_.use_count() > 1) {
        data_ = std::make_shared<std::vector<unsigned char>>(*data_);
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
        std::memcpy(slot(0), later.slot(0, i), static_cast<size_t>(heads_) * vector_bytes_);
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
        if (ring.capacity() != capacity) ring = QueryRing(capacity, shape.q_heads, static_cast<int>(vector));
        ring.restart();
        for (int32_t t = std::max(0, s.count - options_.queries); t < s.count; ++t) {
            ring.advance();
            for (int h = 0; h < shape.q_heads; ++h) {
                const int64_t element = static_cast<int64_t>(b) * q.batch + tokens_[s.first + t] * q.token + h * q.head;
                std::memcpy(ring.slot(h), static_cast<const unsigned char*>(q.data) + element * width, vector);
            }
        }
    }
}

// out [Hq, count, D] of the cache's dtype, count <= W, or null: only the count. Queries of an open step count where the layer has its tokens.
int Store::queries(int layer, SeqId seq, void* out) const {
    check_layer(layer, "queries");
    const Sequence& s = sequence(seq);
    if (s.rings.empty() || layers_[layer].window > 0) return 0;
    QueryRing whole = s.rings[layer];
    for (size_t b = 0; open_ && b < step_.size(); ++b) {
        if (step_[b].sequence == &s && done_[layer] > 0) whole.join(staged_[b * layers_.size() + layer]);
    }
    const LayerShape& shape = layers_[layer];
    const int64_t vector = static_cast<int64_t>(shape.head_dim) * dtype_bytes(options_.dtype);
    auto* to = static_cast<unsigned char*>(out);
    for (int h = 0; to && h < shape.q_heads; ++h) {
        for (int i = 0; i < whole.count(); ++i, to += vector) std::memcpy(to, whole.slot(h, i), vector);
    }
    return whole.count();
}

}  // namespace kvstrata::store
