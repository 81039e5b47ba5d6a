#include "store/index.h"

#include <cstring>
#include <new>
#include <utility>

#include "common/layout.h"
#include "ops/summarize_groups.h"

namespace kvstrata::store {
namespace {

constexpr int64_t kHeader = 64;  // before a block: how many hold it
constexpr std::align_val_t kLine{64};

int64_t& holders(unsigned char* block) { return *reinterpret_cast<int64_t*>(block - kHeader); }

unsigned char* create(int head_dim, SummaryKind kind) {
    const int64_t bytes = summary_bytes(head_dim, kind);
    auto* const memory = static_cast<unsigned char*>(::operator new(kHeader + bytes, kLine));
    unsigned char* const block = memory + kHeader;
    holders(block) = 1;
    std::memset(block, 0, bytes);
    const size_t codes = static_cast<size_t>(kSlots) * head_dim;
    if (kind != SummaryKind::bounds) std::memset(block, kZeroCode, codes);
    if (is_split(kind)) std::memset(block, kZeroNibbles, pairs_of(kind) * codes);
    if (kind == SummaryKind::mean_value) std::memset(block + values_offset(head_dim), kZeroCode, codes);
    return block;
}

void drop(unsigned char* block) {
    if (--holders(block) == 0) ::operator delete(block - kHeader, kLine);
}

// One lane of `lines` lines of sixteen elements.
void copy_elements(unsigned char* to, int to_lane, const unsigned char* from, int lane, int lines, int width) {
    for (int line = 0; line < lines; ++line) {
        std::memcpy(to + width * (line * kSlots + to_lane), from + width * (line * kSlots + lane), width);
    }
}

void copy_lane(unsigned char* to, int to_lane, const unsigned char* from, int lane, int head_dim, SummaryKind kind) {
    if (kind == SummaryKind::bounds) return copy_elements(to, to_lane, from, lane, 2 * head_dim, 2);
    if (is_split(kind)) return copy_elements(to, to_lane, from, lane, pairs_of(kind) * (head_dim / 4 + 2) + 1, 4);
    copy_elements(to, to_lane, from, lane, head_dim / 4 + 3, 4);  // quads of the mean, then scale, spread, radius
    if (kind == SummaryKind::mean) return;
    const int64_t values = values_offset(head_dim), scales = value_scales_offset(head_dim);
    std::memcpy(to + values + to_lane * head_dim, from + values + lane * head_dim, head_dim);
    copy_elements(to + scales, to_lane, from + scales, lane, 2, 4);  // scale, slots
}

}  // namespace

Index::Index(const Index& other)
    : head_dim_(other.head_dim_),
      kind_(other.kind_),
      count_(other.count_),
      groups_(other.groups_),
      blocks_(other.blocks_),
      group_blocks_(other.group_blocks_) {
    for (unsigned char* block : blocks_) ++holders(block);
    for (unsigned char* block : group_blocks_) ++holders(block);
}

Index::Index(Index&& other) noexcept
    : head_dim_(other.head_dim_),
      kind_(other.kind_),
      count_(std::exchange(other.count_, 0)),
      groups_(std::exchange(other.groups_, 0)),
      blocks_(std::move(other.blocks_)),
      group_blocks_(std::move(other.group_blocks_)) {
    other.blocks_.clear();
    other.group_blocks_.clear();
}

Index& Index::operator=(Index other) noexcept {
    std::swap(head_dim_, other.head_dim_);
    std::swap(kind_, other.kind_);
    std::swap(count_, other.count_);
    std::swap(groups_, other.groups_);
    std::swap(blocks_, other.blocks_);
    std::swap(group_blocks_, other.group_blocks_);
    return *this;
}

Index::~Index() { truncate(0); }

unsigned char* Index::own(unsigned char*& block, int head_dim, SummaryKind kind) {
    if (holders(block) > 1) {
        unsigned char* const copy = create(head_dim, kind);
        std::memcpy(copy, block, summary_bytes(head_dim, kind));
        drop(block);
        block = copy;
    }
    return block;
}

Index::Place Index::append() {
    const int b = count_ / kSlots, lane = count_ % kSlots;
    if (lane == 0) {
        if (blocks_.size() == blocks_.capacity()) blocks_.reserve(blocks_.size() + 4 + blocks_.size() / 16);
        blocks_.push_back(create(head_dim_, kind_));
    }
    unsigned char* const block = own(blocks_[b], head_dim_, kind_);
    ++count_;
    return {block, lane};
}

Index::Place Index::append_group() {
    const int b = groups_ / kSlots, lane = groups_ % kSlots;
    if (lane == 0) group_blocks_.push_back(create(head_dim_, SummaryKind::mean));
    unsigned char* const block = own(group_blocks_[b], head_dim_, SummaryKind::mean);
    ++groups_;
    return {block, lane};
}

void Index::narrowed(int entry) { keep_groups(entry / ops::kGroupPages); }

void Index::keep_groups(int count) {
    if (count >= groups_) return;
    const size_t blocks = static_cast<size_t>(count + kSlots - 1) / kSlots;
    for (size_t b = blocks; b < group_blocks_.size(); ++b) drop(group_blocks_[b]);
    group_blocks_.resize(blocks);
    groups_ = count;
}

void Index::join(const Index& more) {
    for (int i = 0; i < more.count_; ++i) {
        const Place to = append();
        copy_lane(to.block, to.lane, more.blocks_[i / kSlots], i % kSlots, head_dim_, kind_);
    }
}

void Index::truncate(int count) {
    const size_t blocks = static_cast<size_t>(count + kSlots - 1) / kSlots;
    for (size_t b = blocks; b < blocks_.size(); ++b) drop(blocks_[b]);
    blocks_.resize(blocks);
    count_ = count;
    keep_groups(count / ops::kGroupPages);
}

void Index::keep(std::span<const int32_t> entries) {
    for (int to = 0; to < static_cast<int>(entries.size()); ++to) {
        const int from = entries[to];
        if (from == to) continue;
        narrowed(to);
        copy_lane(own(blocks_[to / kSlots], head_dim_, kind_), to % kSlots, blocks_[from / kSlots], from % kSlots,
                  head_dim_, kind_);
    }
    truncate(static_cast<int>(entries.size()));
}

int64_t Index::bytes() const {
    int64_t total = static_cast<int64_t>((blocks_.capacity() + group_blocks_.capacity()) * sizeof(unsigned char*));
    for (unsigned char* block : blocks_) total += (kHeader + summary_bytes(head_dim_, kind_)) / holders(block);
    for (unsigned char* block : group_blocks_) total += (kHeader + summary_bytes(head_dim_)) / holders(block);
    return total;
}

}  // namespace kvstrata::store
