// The index of a row: summaries of its sealed entries, in table order, in blocks of sixteen (common/layout.h).
//
// Blocks are shared by forks; one that is written to while others hold it is copied first.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/types.h"

namespace kvstrata::store {

class Index {
  public:
    Index() = default;
    Index(int head_dim, SummaryKind kind) : head_dim_(head_dim), kind_(kind) {}
    Index(const Index& other);
    Index(Index&& other) noexcept;
    Index& operator=(Index other) noexcept;
    ~Index();

    int count() const { return count_; }                                   // entries summarized
    const unsigned char* const* blocks() const { return blocks_.data(); }  // [ceil(count / 16)]

    // Room for one more entry; its block and lane are the caller's to write.
    struct Place {
        unsigned char* block;
        int lane;
    };
    Place append();
    // Of whole groups of entries (ops/summarize_groups.h), as far as they are summarized; likewise.
    int groups() const { return groups_; }
    const unsigned char* const* group_blocks() const { return group_blocks_.data(); }  // [ceil(groups / 16)]
    Place append_group();
    void narrowed(int entry);      // counts otherwise in its group: that, and those behind it, are gone
    void join(const Index& more);  // copies of its entries follow
    void truncate(int count);
    void keep(std::span<const int32_t> entries);  // those that stay, rising, by their present numbers
    int64_t bytes() const;                        // its share of what it holds

  private:
    static unsigned char* own(unsigned char*& block, int head_dim, SummaryKind kind);  // for writing
    void keep_groups(int count);

    int head_dim_ = 0;
    SummaryKind kind_ = SummaryKind::mean;
    int count_ = 0;
    int groups_ = 0;
    std::vector<unsigned char*> blocks_, group_blocks_;
};

}  // namespace kvstrata::store
