// The last queries of a sequence in one layer: what window votes and ARKV's statistics read. They outlive chunks and turns.
//
// A step's queries are staged apart and joined at its commit, so that a step that fails leaves them as they were. Forks
// share the ring until one of them decodes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "store/mirror.h"

namespace kvstrata::store {

class QueryRing {
  public:
    QueryRing() = default;
    // mirror: where its memory is; it lives longer.
    QueryRing(int capacity, int heads, int vector_bytes, Mirror& mirror)
        : capacity_(capacity), heads_(heads), vector_bytes_(vector_bytes), mirror_(&mirror) {}

    int count() const { return count_; }
    int64_t bytes() const { return data_ && !mirror_->on() ? size() : 0; }  // of the CPU's memory
    int capacity() const { return capacity_; }
    void clear();
    void restart() { first_ = count_ = 0; }  // empty, keeps its memory

    // Makes room for the query that follows the last one, forgetting the oldest if need be; head h's vector is then at
    // slot(h), vector_bytes long, the heads side by side.
    void advance();
    unsigned char* slot(int head) { return at(head, count_ - 1); }
    const unsigned char* slot(int head, int i) const { return at(head, i); }  // i-th oldest

    void join(const QueryRing& later);  // its queries follow this one's
    void gather(void* out) const;       // out [heads, count, vector], where ops run
    void drop_last(int64_t n) { count_ = n < count_ ? count_ - static_cast<int>(n) : 0; }

  private:
    unsigned char* at(int head, int i) const {
        const int64_t place = static_cast<int64_t>((first_ + i) % capacity_) * heads_ + head;
        return data_.get() + place * vector_bytes_;
    }
    int64_t size() const { return int64_t{capacity_} * heads_ * vector_bytes_; }

    int capacity_ = 0, heads_ = 0, vector_bytes_ = 0;
    int first_ = 0, count_ = 0;
    Mirror* mirror_ = nullptr;
    std::shared_ptr<unsigned char> data_;  // [capacity, heads, vector]; taken at the first query
};

}  // namespace kvstrata::store
