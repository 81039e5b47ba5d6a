// A row of a page table: the entries of one (sequence, KV head) of one layer, in order.
//
// An entry is (page, alive, hidden, want). The columns lie apart, because kernels read `page` and `visible` as they are;
// `hidden` is kept as its complement within `alive` (visible = alive & ~hidden), so that it exists once.
// Entries below `sealed` are immutable pages, of any format; from there on they are the open tail, pages of the layer's
// full format. The last entry of the tail may have room; every append goes there. Tail entries are in position order.
// A row may carry a note per slot: 32 bits that belong to the row and move with the token (its score), not to the page.
// A row of a cache with a Far tier may hold Near copies of its Far pages (near.h).
// A tagged row says of each page to which set it belongs (set.h). Pages that its view leaves out stand first: a view is the rest
// of the table, and attention reads that as it is.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include "common/types.h"
#include "pages/near.h"
#include "pages/pool.h"
#include "pages/set.h"

namespace kvstrata::pages {

// In `want`: the page's tokens were put together for what they mean; for the time being.
inline constexpr uint8_t kGrouped = 0x80, kProvisional = 0x40;

// Where a device keeps its copy of a row's pages and visible masks (store/mirror.h).
struct DeviceList {
    unsigned char* memory = nullptr;
    int32_t capacity = 0;  // entries
    int32_t current = 0;   // leading entries that stand there as they do here
    int32_t padded = 0;    // from this one on there is no page
    uint32_t epoch = 0;    // of the device's memory as a whole
};

struct Row {
    std::vector<PageId> page;
    std::vector<uint16_t> alive;
    std::vector<uint16_t> visible;
    std::vector<uint8_t> want;   // state and tier the latest plan asked of the page; 0: as it is; and those
    std::vector<uint32_t> note;  // [entries, 16], or empty if the row carries none
    std::vector<SetTag> set;     // of each page, or empty if the row is not tagged
    std::vector<PageId> back;    // the Far page of the same bytes, or kNoPage; likewise
    NearCopies near;             // of Far pages
    DeviceList list;             // its own; nobody shares it
    int32_t sealed = 0;          // entries before this one are sealed
    int32_t stored = 0;          // alive slots of all entries
    int32_t aside = 0;           // leading entries, sealed ones, that the view leaves out
    bool noted = false;          // carries notes
    bool tagged = false;         // its pages are of sets

    int entries() const { return static_cast<int>(page.size()); }
    uint16_t hidden(int entry) const { return static_cast<uint16_t>(alive[entry] & ~visible[entry]); }
    int64_t metadata_bytes() const;

    void changed(int entry) { list.current = entry < list.current ? entry : list.current; }  // it, and all behind it

    // Slots of the last entry that an append may fill; 0 if there is none, or it is sealed.
    int room() const {
        const int last = entries() - 1;
        return last < sealed ? 0 : kSlots - std::bit_width(alive[last]);
    }
};

// A new sealed entry.
struct Fresh {
    PageId page;
    uint16_t alive;
    uint8_t want;
    uint32_t note[kSlots];   // of alive slots; not read if the row carries none
    SetTag set = kBackbone;  // not read if the row is not tagged
};

// Pages that appending n tokens will take, a copy of a shared tail page included.
int64_t pages_needed(const Row& row, int64_t n, Pool& pool);

// Is the last entry's page shared, so that this append must first move to a copy of it?
inline bool must_copy_tail(const Row& row, Pool& pool) { return row.room() > 0 && pool.refs(row.page.back()) > 1; }

// Puts a fresh copy `to` in place of the last entry's page, which loses one holder. Payload is the caller's to copy.
void switch_tail(Row& row, PageId to, Pool& pool);

// Opens places for n tokens at the end of the row, marks them alive and visible and names them in pages [n], slots [n].
// Their positions are the payload writer's to fill in. The tail must not be shared. New pages are the owner's.
void extend(Row& row, int64_t n, Pool& pool, Owner owner, PageId* pages, uint8_t* slots);

// Undoes extend: removes the last n alive slots of the tail.
void withdraw(Row& row, int64_t n, Pools& pools);

// Seals the tail entries whose tokens all lie before `boundary`, in order. Never seals a last entry that has room.
void seal(Row& row, int64_t boundary, Pools& pools);

// Entries narrow to the slots in keep [entries], and empty ones leave; `fresh` ones follow those of the sealed that stay. The
// row's share of pages that left is released; it takes over the references of fresh pages.
void replace(Row& row, std::span<const uint16_t> keep, std::span<const Fresh> fresh, Pools& pools);

// Undoes seal for pending pages at the end of the sealed ones that hold a token from `boundary` on, of a tagged row: those that
// a crop leaves as the last ones are the tail again.
void reopen(Row& row, int64_t boundary, Pools& pools);

// Drops leading whole entries whose tokens all lie before `boundary`. Returns one past the highest dropped position, or 0.
int64_t drop_before(Row& row, int64_t boundary, Pools& pools);

// Removes every token at position `length` or later. `kept`, if given, names the entries that stay, as they were numbered.
void crop(Row& row, int64_t length, Pools& pools, std::vector<int32_t>* kept = nullptr);

// Pages of sealed entries that stay are of other sets: tags [entries].
void tag(Row& row, std::span<const SetTag> tags);

// Puts sealed entries that the view leaves out first, each part by set, and a set as it stands: the order is that of the view,
// whatever views came before.
void arrange(Row& row, const View& view);

// An entry's page is another one of the same bytes: the old one's share is released, but for one that is kept as `back`.
void come_near(Row& row, int entry, PageId near);            // its Far page is kept
void go_far(Row& row, int entry, PageId far, Pools& pools);  // far: what is kept already, or a new one

// A second row over the same pages, without Near copies or a device's list of its own.
Row share(const Row& row, Pools& pools);
void release(Row& row, Pools& pools);  // its device's list stays, of nothing

// Positions of the alive slots in table order.
void positions(const Row& row, Pools& pools, int32_t* out);

}  // namespace kvstrata::pages
