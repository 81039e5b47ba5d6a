#include "pages/pool.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <stdexcept>

#include "common/check.h"

namespace kvstrata::pages {
namespace {

constexpr int64_t kChargeBytes = 48;  // of an owner's count: its node, and its part of the buckets

}  // namespace

int Pool::lend(unsigned char* payload, int32_t* positions, int n_pages, int32_t* on_device) {
    check(n_pages >= 1 && n_pages <= kMaxPagesPerSlab, "lend: n_pages is ", n_pages, ", expected 1..",
          kMaxPagesPerSlab);
    check(reinterpret_cast<uintptr_t>(payload) % 64 == 0, "lend: slab address is not a multiple of 64 bytes");
    auto vacant = std::find_if(slabs_.begin(), slabs_.end(), [](const Slab& s) { return s.n_pages == 0; });
    const int index = static_cast<int>(vacant - slabs_.begin());
    check(index < kMaxSlabs, "lend: the pool has ", kMaxSlabs, " slabs, and no more can be named");
    if (vacant == slabs_.end()) {
        if (slabs_.size() == slabs_.capacity()) {  // doubling could pass a limit that has room for one slab
            const size_t room = slabs_.size() + std::max<size_t>(4, slabs_.size() / 16);
            slabs_.reserve(room);
            payloads_.reserve(room);
            positions_.reserve(room);
        }
        slabs_.emplace_back();
        payloads_.push_back(nullptr);
        positions_.push_back(nullptr);
    }
    Slab& slab = slabs_[index];
    slab = Slab{payload, positions, n_pages, n_pages, false, {}, {}, {}};
    slab.free_bits.assign((n_pages + 63) / 64, ~uint64_t{0});
    if (n_pages % 64) slab.free_bits.back() = (uint64_t{1} << (n_pages % 64)) - 1;
    slab.refs.assign(n_pages, 0);
    if (charged_) slab.owners.assign(n_pages, kCache);
    payloads_[index] = payload;
    positions_[index] = on_device ? on_device : positions;
    total_ += n_pages;
    free_ += n_pages;
    first_ = std::min(first_, index);
    return index;
}

void Pool::give_back(int index) {
    check(index >= 0 && index < static_cast<int>(slabs_.size()) && slabs_[index].n_pages > 0, "give_back: slab is ",
          index, ", expected a lent slab");
    check(empty(index), "give_back: slab ", index, " still holds pages");
    Slab& slab = slabs_[index];
    total_ -= slab.n_pages;
    (slab.closed ? closed_free_ : free_) -= slab.n_pages;
    slab = Slab{};
    payloads_[index] = nullptr;
    positions_[index] = nullptr;
}

void Pool::set_closed(int index, bool closed) {
    Slab& slab = slabs_[index];
    if (slab.closed == closed) return;
    slab.closed = closed;
    (closed ? closed_free_ : free_) += slab.n_free;
    (closed ? free_ : closed_free_) -= slab.n_free;
    if (!closed) first_ = std::min(first_, index);
}

PageId Pool::take(Owner owner) {
    for (; first_ < static_cast<int>(slabs_.size()); ++first_) {
        Slab& slab = slabs_[first_];
        if (slab.n_free == 0 || slab.closed) continue;
        for (size_t w = 0;; ++w) {
            assert(w < slab.free_bits.size());
            if (!slab.free_bits[w]) continue;
            const int index = static_cast<int>(w * 64) + std::countr_zero(slab.free_bits[w]);
            slab.free_bits[w] &= slab.free_bits[w] - 1;
            slab.refs[index] = 1;
            --slab.n_free;
            --free_;
            if (charged_) {
                slab.owners[index] = owner;
                ++charges_[owner];
            }
            return make_page(id_, first_, index);
        }
    }
    throw std::logic_error("take: no free page; the step did not reserve what it uses");
}

PageId Pool::take(int slab, int index, Owner owner) {
    check(slab >= 0 && slab < static_cast<int>(slabs_.size()) && index >= 0 && index < slabs_[slab].n_pages,
          "take: page ", index, " of slab ", slab, ", expected one that is lent");
    Slab& s = slabs_[slab];
    const uint64_t bit = uint64_t{1} << (index % 64);
    check(s.free_bits[index / 64] & bit, "take: page ", index, " of slab ", slab, " is taken, expected a free one");
    s.free_bits[index / 64] &= ~bit;
    s.refs[index] = 1;
    if (charged_) {
        s.owners[index] = owner;
        ++charges_[owner];
    }
    --s.n_free;
    --(s.closed ? closed_free_ : free_);
    return make_page(id_, slab, index);
}

bool Pool::release(PageId id) {
    Slab& slab = slabs_[page_slab(id)];
    const int index = page_index(id);
    assert(slab.refs[index] > 0);
    if (--slab.refs[index] > 0) return false;
    if (charged_) {
        const auto at = charges_.find(slab.owners[index]);
        if (--at->second == 0) charges_.erase(at);
    }
    slab.free_bits[index / 64] |= uint64_t{1} << (index % 64);
    ++slab.n_free;
    ++(slab.closed ? closed_free_ : free_);
    if (!slab.closed) first_ = std::min(first_, page_slab(id));
    return true;
}

int64_t Pool::metadata_bytes() const {
    int64_t bytes = static_cast<int64_t>(slabs_.capacity() * sizeof(Slab) + payloads_.capacity() * sizeof(void*) * 2);
    for (const Slab& s : slabs_)
        bytes += s.free_bits.capacity() * sizeof(uint64_t) + s.refs.capacity() * sizeof(uint32_t) +
                 s.owners.capacity() * sizeof(Owner);
    return bytes + static_cast<int64_t>(charges_.size() * kChargeBytes);
}

}  // namespace kvstrata::pages
