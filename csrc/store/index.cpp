#include "store/index.h"

#include <cstring>
#include <new>
#include <utility>

#include "common/layout.h"

namespace kvstrata::store {
namespace {

constexpr int64_t kHeader = 64;  // before a block: how many hold it
constexpr std::align_val_t kLine{64};

int64_t& holders(unsigned char* block) { return *reinterpret_cast<int64_t*>(block - kHeader); }

unsigned char* create(int head_dim) {
    auto* const memory = static_cast<unsigned char*>(::operator new(kHeader + summary_bytes(head_dim), kLine));
    unsigned char* const block = memory + kHeader;
    holders(block) = 1;
    std::memset(block, kZeroCode, static_cast<size_t>(kSlots) * head_dim);
    std::memset(block + static_cast<int64_t>(kSlots) * head_dim, 0, 12 * kSlots);
    return block;
}

void drop(unsigned char* block) {
    if (--holders(block) == 0) ::operator delete(block - kHeader, kLine);
}

void copy_lane(unsigned char* to, int to_lane, const unsigned char* from, int lane, int head_dim) {
    for (int word = 0; word < head_dim / 4 + 3; ++word) {  // quads of the mean, then scale, spread, radius
        std::memcpy(to + 4 * (word * kSlots + to_lane), from + 4 * (word * kSlots + lane), 4);
    }
}

}  // namespace

Index::Index(const Index& other) : head_dim_(other.head_dim_), count_(other.count_), blocks_(other.blocks_) {
    for (unsigned char* block : blocks_) ++holders(block);
}

Index::Index(Index&& other) noexcept
    : head_dim_(other.head_dim_), count_(std::exchange(other.count_, 0)), blocks_(std::move(other.blocks_)) {
    other.blocks_.clear();
}

Index& Index::operator=(Index other) noexcept {
    std::swap(head_dim_, other.head_dim_);
    std::swap(count_, other.count_);
    std::swap(blocks_, other.blocks_);
    return *this;
}

Index::~Index() { truncate(0); }

unsigned char* Index::own(int b) {
    unsigned char*& block = blocks_[b];
    if (holders(block) > 1) {
        unsigned char* const copy = create(head_dim_);
        std::memcpy(copy, block, summary_bytes(head_dim_));
        drop(block);
        block = copy;
    }
    return block;
}

Index::Place Index::append() {
    const int b = count_ / kSlots, lane = count_ % kSlots;
    if (lane == 0) {
        if (blocks_.size() == blocks_.capacity()) blocks_.reserve(blocks_.size() + 4 + blocks_.size() / 16);
        blocks_.push_back(create(head_dim_));
    }
    unsigned char* const block = own(b);
    ++count_;
    return {block, lane};
}

void Index::join(const Index& more) {
    for (int i = 0; i < more.count_; ++i) {
        const Place to = append();
        copy_lane(to.block, to.lane, more.blocks_[i / kSlots], i % kSlots, head_dim_);
    }
}

void Index::truncate(int count) {
    const size_t blocks = static_cast<size_t>(count + kSlots - 1) / kSlots;
    for (size_t b = blocks; b < blocks_.size(); ++b) drop(blocks_[b]);
    blocks_.resize(blocks);
    count_ = count;
}

void Index::keep(std::span<const int32_t> entries) {
    for (int to = 0; to < static_cast<int>(entries.size()); ++to) {
        const int from = entries[to];
        if (from == to) continue;
        copy_lane(own(to / kSlots), to % kSlots, blocks_[from / kSlots], from % kSlots, head_dim_);
    }
    truncate(static_cast<int>(entries.size()));
}

int64_t Index::bytes() const {
    int64_t total = static_cast<int64_t>(blocks_.capacity() * sizeof(unsigned char*));
    for (unsigned char* block : blocks_) total += (kHeader + summary_bytes(head_dim_)) / holders(block);
    return total;
}

}  // namespace kvstrata::store
