// A pool: the free and used pages of one tier, one format and one head dimension, cut from slabs that Python lends.
//
// Integers and addresses only. A page's refcount is the number of page-table entries that hold it; at 0 it is free and
// can be taken in the same step. Pages are taken from the lowest slab that has one free, so that high slabs run empty
// and can be returned. A charged pool knows of each page in use who took it: a page is charged to that owner for its life,
// whoever holds it.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "common/types.h"

namespace kvstrata::pages {

using Owner = uint32_t;
inline constexpr Owner kCache = 0;  // who takes what belongs to no sequence

struct Slab {
    unsigned char* payload = nullptr;  // first page; 64-byte aligned
    int32_t* positions = nullptr;      // i32 [n_pages, 16]
    int32_t n_pages = 0;               // 0: this index is vacant
    int32_t n_free = 0;
    bool closed = false;              // being emptied: no page is taken from it
    std::vector<uint64_t> free_bits;  // bit i: page i is free
    std::vector<uint32_t> refs;       // [n_pages]
    std::vector<Owner> owners;        // [n_pages] of a charged pool, of pages in use
};

class Pool {
  public:
    Pool(int id, int64_t page_bytes, bool charged) : id_(id), page_bytes_(page_bytes), charged_(charged) {}

    // -> slab index. on_device: the positions that ops see, where they run elsewhere than here; else null.
    int lend(unsigned char* payload, int32_t* positions, int n_pages, int32_t* on_device = nullptr);
    void give_back(int slab);  // the slab must be empty
    bool empty(int slab) const { return slabs_[slab].n_free == slabs_[slab].n_pages; }
    void set_closed(int slab, bool closed);

    PageId take(Owner owner);  // refcount 1; throws std::logic_error if no page is free: reserve first
    PageId take(int slab, int index, Owner owner);  // that one, which must be free, of a closed slab too
    void share(PageId id) { ++refs(id); }
    bool release(PageId id);  // true if the page became free
    uint32_t& refs(PageId id) { return slabs_[page_slab(id)].refs[page_index(id)]; }
    Owner owner(PageId id) const { return charged_ ? slabs_[page_slab(id)].owners[page_index(id)] : kCache; }
    const std::unordered_map<Owner, int64_t>& charges() const { return charges_; }  // pages in use of a charged pool

    int32_t* positions(PageId id) { return slabs_[page_slab(id)].positions + page_index(id) * kSlots; }
    const int32_t* positions(PageId id) const { return slabs_[page_slab(id)].positions + page_index(id) * kSlots; }
    unsigned char* payload(PageId id) { return slabs_[page_slab(id)].payload + page_index(id) * page_bytes_; }

    const std::vector<Slab>& slabs() const { return slabs_; }
    unsigned char* const* payload_table() const { return payloads_.data(); }
    int32_t* const* position_table() const { return positions_.data(); }
    int32_t* device_positions(PageId id) const { return positions_[page_slab(id)] + page_index(id) * kSlots; }
    int64_t page_bytes() const { return page_bytes_; }
    int64_t total() const { return total_; }
    int64_t free() const { return free_; }
    int64_t used() const { return total_ - free_ - closed_free_; }
    int64_t metadata_bytes() const;

  private:
    int id_;
    int64_t page_bytes_;
    bool charged_;
    std::unordered_map<Owner, int64_t> charges_;
    int64_t total_ = 0, free_ = 0;  // free_: pages that can be taken now
    int64_t closed_free_ = 0;       // free pages of closed slabs
    int first_ = 0;                 // no slab below this index has a page to take
    std::vector<Slab> slabs_;
    std::vector<unsigned char*> payloads_;  // [slabs], what ops see
    std::vector<int32_t*> positions_;       // likewise
};

// All pools of a store, by the pool number in a page's id.
using Pools = std::vector<Pool>;

inline Pool& pool_of(Pools& pools, PageId id) { return pools[page_pool(id)]; }

}  // namespace kvstrata::pages
