#include "pages/row.h"

#include <algorithm>
#include <cassert>

namespace kvstrata::pages {
namespace {

// Highest position among the alive slots of an entry; -1 if none.
int64_t last_position(const Row& row, int entry, Pool& pool) {
    const int32_t* pos = pool.positions(row.page[entry]);
    int64_t last = -1;
    for (uint16_t m = row.alive[entry]; m; m &= m - 1) last = std::max<int64_t>(last, pos[std::countr_zero(m)]);
    return last;
}

// Narrows an entry to the slots in `keep`.
void narrow(Row& row, int entry, uint16_t keep) {
    row.stored -= std::popcount(static_cast<uint16_t>(row.alive[entry] & ~keep));
    row.alive[entry] &= keep;
    row.visible[entry] &= keep;
}

// Releases entries with no alive slot and closes the gaps; `sealed` follows.
void drop_empty(Row& row, Pool& pool) {
    int kept = 0, sealed = 0;
    for (int e = 0; e < row.entries(); ++e) {
        if (!row.alive[e]) {
            pool.release(row.page[e]);
            continue;
        }
        row.page[kept] = row.page[e];
        row.alive[kept] = row.alive[e];
        row.visible[kept] = row.visible[e];
        row.want[kept] = row.want[e];
        sealed += e < row.sealed;
        ++kept;
    }
    row.page.resize(kept);
    row.alive.resize(kept);
    row.visible.resize(kept);
    row.want.resize(kept);
    row.sealed = sealed;
}

}  // namespace

int64_t Row::metadata_bytes() const {
    return static_cast<int64_t>(sizeof(Row) + page.capacity() * sizeof(PageId) +
                                (alive.capacity() + visible.capacity()) * sizeof(uint16_t) + want.capacity());
}

int64_t pages_needed(const Row& row, int64_t n, Pool& pool) {
    if (n <= 0) return 0;
    const int64_t room = row.room();
    const int64_t fresh = n > room ? (n - room + kSlots - 1) / kSlots : 0;
    return fresh + (must_copy_tail(row, pool) ? 1 : 0);
}

void switch_tail(Row& row, PageId to, Pool& pool) {
    pool.release(row.page.back());
    row.page.back() = to;
}

void extend(Row& row, int64_t n, Pool& pool, PageId* pages, uint8_t* slots) {
    for (int64_t i = 0; i < n;) {
        if (row.room() == 0) {
            row.page.push_back(pool.take());
            row.alive.push_back(0);
            row.visible.push_back(0);
            row.want.push_back(0);
        }
        const int last = row.entries() - 1;
        const int first = kSlots - row.room();
        const int count = static_cast<int>(std::min<int64_t>(n - i, kSlots - first));
        for (int s = 0; s < count; ++s) {
            pages[i + s] = row.page[last];
            slots[i + s] = static_cast<uint8_t>(first + s);
        }
        const uint16_t mask = static_cast<uint16_t>(((1u << count) - 1) << first);
        row.alive[last] |= mask;
        row.visible[last] |= mask;
        row.stored += count;
        i += count;
    }
}

void withdraw(Row& row, int64_t n, Pool& pool) {
    for (int e = row.entries() - 1; n > 0; --e) {
        assert(e >= row.sealed);
        uint16_t keep = row.alive[e];
        for (; n > 0 && keep; --n) keep &= static_cast<uint16_t>(~(1u << (std::bit_width(keep) - 1)));
        narrow(row, e, keep);
    }
    drop_empty(row, pool);
}

void seal(Row& row, int64_t boundary, Pool& pool) {
    while (row.sealed < row.entries()) {
        const bool open = row.sealed == row.entries() - 1 && row.room() > 0;
        if (open || last_position(row, row.sealed, pool) >= boundary) return;
        ++row.sealed;
    }
}

void evict(Row& row, std::span<const uint8_t> keep, Pool& pool) {
    assert(static_cast<int64_t>(keep.size()) == row.stored);
    size_t i = 0;
    for (int e = 0; e < row.entries(); ++e) {
        uint16_t kept = 0;
        for (uint16_t m = row.alive[e]; m; m &= m - 1) {
            if (keep[i++]) kept |= static_cast<uint16_t>(1u << std::countr_zero(m));
        }
        narrow(row, e, kept);
    }
    drop_empty(row, pool);
}

int64_t drop_before(Row& row, int64_t boundary, Pool& pool) {
    int64_t dropped = 0;
    int e = 0;
    for (; e < row.entries(); ++e) {
        const int64_t last = last_position(row, e, pool);
        const bool open = e == row.entries() - 1 && row.room() > 0;
        if (open || last >= boundary) break;
        dropped = std::max(dropped, last + 1);
        narrow(row, e, 0);
    }
    if (e > 0) drop_empty(row, pool);
    return dropped;
}

void crop(Row& row, int64_t length, Pool& pool) {
    bool emptied = false;
    for (int e = row.entries() - 1; e >= 0; --e) {
        const int32_t* pos = pool.positions(row.page[e]);
        uint16_t keep = 0;
        for (uint16_t m = row.alive[e]; m; m &= m - 1) {
            const int slot = std::countr_zero(m);
            if (pos[slot] < length) keep |= static_cast<uint16_t>(1u << slot);
        }
        // The tail is in position order: once an entry of it stays whole, so does all before it.
        if (keep == row.alive[e] && e >= row.sealed) break;
        narrow(row, e, keep);
        emptied |= keep == 0;
    }
    if (emptied) drop_empty(row, pool);
}

Row share(const Row& row, Pool& pool) {
    for (PageId id : row.page) pool.share(id);
    return row;
}

void release(Row& row, Pool& pool) {
    for (PageId id : row.page) pool.release(id);
    row = Row{};
}

void positions(const Row& row, Pool& pool, int32_t* out) {
    for (int e = 0; e < row.entries(); ++e) {
        const int32_t* pos = pool.positions(row.page[e]);
        for (uint16_t m = row.alive[e]; m; m &= m - 1) *out++ = pos[std::countr_zero(m)];
    }
}

}  // namespace kvstrata::pages
