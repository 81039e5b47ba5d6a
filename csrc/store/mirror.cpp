#include "store/mirror.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <utility>

namespace kvstrata::store {
namespace {

constexpr int32_t kLeastEntries = 16;
constexpr int64_t kEntryBytes = sizeof(PageId) + sizeof(uint16_t);
constexpr int64_t kLeastBlock = 64 << 10;
constexpr int64_t kLeastSlabs = 16;
constexpr int32_t kPadAtOnce = 1024;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

unsigned char* Mirror::table(int64_t bytes) {
    bytes = aligned(bytes);
    if (block_left_ < bytes) {
        const int64_t size = std::max({bytes, kLeastBlock, aligned(tables_ / 4)});
        block_ = lend_(Loan::tables, size);
        block_left_ = size;
        tables_ += size;
    }
    unsigned char* const at = block_;
    block_ += bytes;
    block_left_ -= bytes;
    return at;
}

const PageId* Mirror::pages(pages::Row& row, int32_t least) {
    if (!on()) return row.page.data();
    pages::DeviceList& list = row.list;
    const int32_t entries = row.entries();
    if (list.epoch != epoch_) list.current = 0, list.padded = list.capacity;
    list.epoch = epoch_;
    if (const int32_t wanted = std::max(entries, least); wanted > list.capacity) {
        const auto capacity =
            static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(std::max(wanted, kLeastEntries))));
        const size_t size = static_cast<size_t>(std::countr_zero(static_cast<uint32_t>(capacity)));
        leave(row);
        if (spare_.size() <= size) spare_.resize(size + 1);
        if (spare_[size].empty()) {
            list.memory = table(capacity * kEntryBytes);
        } else {
            list.memory = spare_[size].back();
            spare_[size].pop_back();
        }
        list.capacity = list.padded = capacity;
        list.epoch = epoch_;
    }
    auto* const page = reinterpret_cast<PageId*>(list.memory);
    if (list.current < entries) {
        auto* const mask = reinterpret_cast<uint16_t*>(page + list.capacity);
        const int32_t first = list.current, n = entries - first;
        queue_.push_back({page + first, row.page.data() + first, n * int64_t{sizeof(PageId)}});
        queue_.push_back({mask + first, row.visible.data() + first, n * int64_t{sizeof(uint16_t)}});
        list.current = entries;
        list.padded = std::max(list.padded, entries);
    }
    return page;
}

void Mirror::pad(pages::Row& row) {
    static const std::vector<PageId> none(kPadAtOnce, kNoPage);
    auto* const page = reinterpret_cast<PageId*>(row.list.memory);
    for (int32_t first = row.entries(); first < row.list.padded; first += kPadAtOnce) {
        put(page + first, none.data(), std::min(kPadAtOnce, row.list.padded - first) * int64_t{sizeof(PageId)});
    }
    row.list.padded = row.entries();
}

const uint16_t* Mirror::visible(const pages::Row& row) const {
    if (!on()) return row.visible.data();
    return reinterpret_cast<const uint16_t*>(row.list.memory + row.list.capacity * int64_t{sizeof(PageId)});
}

void Mirror::leave(pages::Row& row) {
    if (row.list.capacity > 0) {
        spare_[std::countr_zero(static_cast<uint32_t>(row.list.capacity))].push_back(row.list.memory);
    }
    row.list = {};
}

void Mirror::pools(PoolView* out, size_t n, uint64_t version) {
    constexpr int64_t kEach = sizeof(void*);
    std::array<int64_t, kMaxPools> room = slab_room_;
    int64_t bytes = 0;
    for (size_t p = 0; p < n; ++p) {
        if (out[p].n_slabs > room[p]) room[p] = std::max<int64_t>(kLeastSlabs, std::bit_ceil(2u * out[p].n_slabs));
        bytes += 2 * kEach * room[p];
    }
    const bool grown = room != slab_room_;
    if (grown) {
        pools_ = lend_(Loan::pools, bytes);
        slab_room_ = room;
    }
    unsigned char* at = pools_;
    for (size_t p = 0; p < n; ++p) {
        const int64_t size = out[p].n_slabs * kEach;
        unsigned char* const positions = at + kEach * room[p];
        if (size > 0 && (grown || version != pools_version_)) {
            put(at, out[p].slabs, size);
            put(positions, out[p].positions, size);
        }
        if (size > 0) {
            out[p].slabs = reinterpret_cast<unsigned char* const*>(at);
            out[p].positions = reinterpret_cast<int32_t* const*>(positions);
        }
        at += 2 * kEach * room[p];
    }
    pools_version_ = version;
}

void Mirror::begin_lists(int64_t bytes) {
    if (!queue_.empty()) forget();
    if (bytes > lists_size_) {
        lists_size_ = std::max<int64_t>(aligned(bytes), 2 * lists_size_);
        lists_ = lend_(Loan::lists, lists_size_);
    }
    lists_used_ = 0;
}

void* Mirror::place(const void* from, int64_t bytes) {
    void* const at = lists_ + lists_used_;
    lists_used_ += list_bytes(bytes);
    assert(lists_used_ <= lists_size_);
    if (from && bytes > 0) queue_.push_back({at, from, bytes});
    return at;
}

unsigned char* Mirror::workspace(int64_t bytes) {
    if (bytes > workspace_size_) {
        workspace_size_ = aligned(bytes);
        workspace_ = lend_(Loan::workspace, workspace_size_);
    }
    return workspace_;
}

void Mirror::settle_workspace(bool large) {
    if (!large) {
        kept_workspace_ = workspace_size_;
    } else if (workspace_size_ > kept_workspace_) {
        workspace_size_ = kept_workspace_;
        workspace_ = lend_(Loan::workspace, workspace_size_);
    }
}

float* Mirror::constant(std::span<const float> from) {
    auto* const at = reinterpret_cast<float*>(table(static_cast<int64_t>(from.size_bytes())));
    queue_.push_back({at, from.data(), static_cast<int64_t>(from.size_bytes())});
    flush();
    return at;
}

std::shared_ptr<unsigned char> Mirror::shared(int64_t bytes) {
    if (!on()) return {new unsigned char[static_cast<size_t>(bytes)], std::default_delete<unsigned char[]>()};
    std::vector<unsigned char*>& idle = idle_[bytes];
    unsigned char* const at = idle.empty() ? table(bytes) : idle.back();
    if (!idle.empty()) idle.pop_back();
    return {at, [this, bytes](unsigned char* memory) { idle_[bytes].push_back(memory); }};
}

void Mirror::flush() {
    const std::vector<ops::Piece> pieces = std::exchange(queue_, {});
    try {
        ops::upload(pieces, where);
    } catch (...) {
        forget();
        throw;
    }
}

// Nothing that the device holds is known.
void Mirror::forget() {
    queue_.clear();
    pools_version_ = 0;
    ++epoch_;
}

}  // namespace kvstrata::store
