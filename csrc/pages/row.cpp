#include "pages/row.h"

#include <algorithm>
#include <cassert>
#include <numeric>

namespace kvstrata::pages {
namespace {

// Entries that a row makes room for beyond those it has: doubling would cost more than a small page's other books.
constexpr int spare_entries(int entries) { return 8 + entries / 16; }

// Highest position among the alive slots of an entry; -1 if none.
int64_t last_position(const Row& row, int entry, Pools& pools) {
    const int32_t* pos = pool_of(pools, row.page[entry]).positions(row.page[entry]);
    int64_t last = -1;
    for (uint16_t m = row.alive[entry]; m; m &= m - 1) last = std::max<int64_t>(last, pos[std::countr_zero(m)]);
    return last;
}

// Narrows an entry to the slots in `keep`.
void narrow(Row& row, int entry, uint16_t keep) {
    row.stored -= std::popcount(static_cast<uint16_t>(row.alive[entry] & ~keep));
    row.alive[entry] &= keep;
    row.visible[entry] &= keep;
    row.changed(entry);
}

template <class T>
void resize(std::vector<T>& column, int entries, size_t each = 1) {
    const size_t size = entries * each;
    if (size > column.capacity()) column.reserve(size + spare_entries(entries) * each);
    column.resize(size);
}

void resize(Row& row, int entries) {
    resize(row.page, entries);
    resize(row.alive, entries);
    resize(row.visible, entries);
    resize(row.want, entries);
    row.near.resize(entries);
    row.changed(entries);
    if (row.tagged) resize(row.set, entries), resize(row.back, entries);
    if (row.noted) resize(row.note, entries, kSlots);
}

// Gives back room that a shrunken row has no use for.
void tighten(Row& row) {
    if (row.page.capacity() <= row.page.size() + 2 * spare_entries(row.entries())) return;
    row.page.shrink_to_fit();
    row.alive.shrink_to_fit();
    row.visible.shrink_to_fit();
    row.want.shrink_to_fit();
    row.set.shrink_to_fit();
    row.back.shrink_to_fit();
    row.note.shrink_to_fit();
}

// Entry `from` to place `to`; what stood there is overwritten.
void move_entry(Row& row, int from, int to) {
    row.changed(to);
    row.page[to] = row.page[from];
    row.alive[to] = row.alive[from];
    row.visible[to] = row.visible[from];
    row.want[to] = row.want[from];
    if (row.tagged) row.set[to] = row.set[from], row.back[to] = row.back[from];
    row.near.move(from, to);
    if (row.noted) std::copy_n(&row.note[static_cast<size_t>(from) * kSlots], kSlots, &row.note[to * size_t{kSlots}]);
}

// The Far page that an entry has beside its own.
void release_back(Row& row, int entry, Pools& pools) {
    if (row.back[entry] != kNoPage) pool_of(pools, row.back[entry]).release(row.back[entry]);
    row.back[entry] = kNoPage;
}

// Releases entries with no alive slot and closes the gaps; `sealed` follows. Names those that stay.
void drop_empty(Row& row, Pools& pools, std::vector<int32_t>* stay = nullptr) {
    int kept = 0, sealed = 0, aside = 0;
    for (int e = 0; e < row.entries(); ++e) {
        if (!row.alive[e]) {
            pool_of(pools, row.page[e]).release(row.page[e]);
            if (row.tagged) release_back(row, e, pools);
            row.near.leave(e);
            continue;
        }
        if (stay) stay->push_back(e);
        if (kept != e) move_entry(row, e, kept);
        sealed += e < row.sealed;
        aside += e < row.aside;
        ++kept;
    }
    resize(row, kept);
    row.sealed = sealed;
    row.aside = aside;
}

}  // namespace

int64_t Row::metadata_bytes() const {
    return static_cast<int64_t>(sizeof(Row) + page.capacity() * sizeof(PageId) +
                                (alive.capacity() + visible.capacity()) * sizeof(uint16_t) + want.capacity() +
                                note.capacity() * sizeof(uint32_t) + set.capacity() * sizeof(SetTag) +
                                back.capacity() * sizeof(PageId)) +
           near.metadata_bytes();
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
    row.changed(row.entries() - 1);
}

void extend(Row& row, int64_t n, Pool& pool, Owner owner, PageId* pages, uint8_t* slots) {
    for (int64_t i = 0; i < n;) {
        if (row.room() == 0) {
            const PageId page = pool.take(owner);
            resize(row, row.entries() + 1);
            row.page.back() = page;
            if (row.tagged) row.set.back() = kPending, row.back.back() = kNoPage;
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
        row.changed(last);
        if (row.noted) std::fill_n(&row.note[last * size_t{kSlots} + first], count, 0u);
        row.stored += count;
        i += count;
    }
}

void withdraw(Row& row, int64_t n, Pools& pools) {
    for (int e = row.entries() - 1; n > 0; --e) {
        assert(e >= row.sealed);
        uint16_t keep = row.alive[e];
        for (; n > 0 && keep; --n) keep &= static_cast<uint16_t>(~(1u << (std::bit_width(keep) - 1)));
        narrow(row, e, keep);
    }
    drop_empty(row, pools);
}

void seal(Row& row, int64_t boundary, Pools& pools) {
    while (row.sealed < row.entries()) {
        const bool open = row.sealed == row.entries() - 1 && row.room() > 0;
        if (open || last_position(row, row.sealed, pools) >= boundary) return;
        ++row.sealed;
    }
}

void reopen(Row& row, int64_t boundary, Pools& pools) {
    while (row.tagged && row.sealed > 0 && row.set[row.sealed - 1] == kPending &&
           last_position(row, row.sealed - 1, pools) >= boundary) {
        --row.sealed;
    }
}

void replace(Row& row, std::span<const uint16_t> keep, std::span<const Fresh> fresh, Pools& pools) {
    assert(static_cast<int>(keep.size()) == row.entries());
    const int tail = row.entries() - row.sealed, n_fresh = static_cast<int>(fresh.size()), first = row.sealed;
    for (int e = 0; e < row.entries(); ++e) narrow(row, e, keep[e]);
    resize(row, row.entries() + n_fresh);
    for (int t = tail - 1; n_fresh > 0 && t >= 0; --t) move_entry(row, first + t, first + n_fresh + t);
    row.changed(first);
    for (int f = 0; f < n_fresh; ++f) {
        row.page[first + f] = fresh[f].page;
        row.alive[first + f] = row.visible[first + f] = fresh[f].alive;
        row.want[first + f] = fresh[f].want;
        if (row.tagged) row.set[first + f] = fresh[f].set, row.back[first + f] = kNoPage;
        if (row.noted) std::copy_n(fresh[f].note, kSlots, &row.note[static_cast<size_t>(first + f) * kSlots]);
        row.stored += std::popcount(fresh[f].alive);
    }
    row.sealed += n_fresh;
    drop_empty(row, pools);
    tighten(row);
}

int64_t drop_before(Row& row, int64_t boundary, Pools& pools) {
    int64_t dropped = 0;
    int e = 0;
    for (; e < row.entries(); ++e) {
        const int64_t last = last_position(row, e, pools);
        const bool open = e == row.entries() - 1 && row.room() > 0;
        if (open || last >= boundary) break;
        dropped = std::max(dropped, last + 1);
        narrow(row, e, 0);
    }
    if (e > 0) drop_empty(row, pools);
    return dropped;
}

void crop(Row& row, int64_t length, Pools& pools, std::vector<int32_t>* kept) {
    bool emptied = false;
    for (int e = row.entries() - 1; e >= 0; --e) {
        const int32_t* pos = pool_of(pools, row.page[e]).positions(row.page[e]);
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
    if (emptied) drop_empty(row, pools, kept);
    if (!emptied && kept) {
        for (int e = 0; e < row.entries(); ++e) kept->push_back(e);
    }
}

void tag(Row& row, std::span<const SetTag> tags) {
    assert(row.tagged && static_cast<int>(tags.size()) == row.entries());
    std::copy_n(tags.begin(), row.sealed, row.set.begin());
}

void arrange(Row& row, const View& view) {
    if (!row.tagged) return;
    std::vector<int> order(row.sealed);
    std::iota(order.begin(), order.end(), 0);
    const auto before = [&](int a, int b) {
        const bool shown = view.shows(row.set[a]), other = view.shows(row.set[b]);
        return shown != other ? other : row.set[a] < row.set[b];
    };
    std::stable_sort(order.begin(), order.end(), before);
    const auto hidden = [&](int e) { return !view.shows(row.set[e]); };
    row.aside = static_cast<int32_t>(std::count_if(order.begin(), order.end(), hidden));
    if (std::is_sorted(order.begin(), order.end())) return;
    const auto permute = [&](auto& column, size_t each) {
        auto old = column;
        for (size_t e = 0; e < order.size(); ++e) std::copy_n(&old[order[e] * each], each, &column[e * each]);
    };
    row.changed(0);
    permute(row.page, 1);
    permute(row.alive, 1);
    permute(row.visible, 1);
    permute(row.want, 1);
    permute(row.set, 1);
    permute(row.back, 1);
    if (row.noted) permute(row.note, kSlots);
}

void come_near(Row& row, int entry, PageId near) {
    row.back[entry] = row.page[entry];
    row.page[entry] = near;
    row.changed(entry);
}

void go_far(Row& row, int entry, PageId far, Pools& pools) {
    pool_of(pools, row.page[entry]).release(row.page[entry]);
    row.page[entry] = far;
    row.changed(entry);
    row.back[entry] = kNoPage;
}

Row share(const Row& row, Pools& pools) {
    for (PageId id : row.page) pool_of(pools, id).share(id);
    for (PageId id : row.back) {
        if (id != kNoPage) pool_of(pools, id).share(id);
    }
    Row copy = row;
    copy.near = {};
    copy.list = {};
    return copy;
}

void release(Row& row, Pools& pools) {
    for (PageId id : row.page) pool_of(pools, id).release(id);
    for (int e = 0; row.tagged && e < row.entries(); ++e) release_back(row, e, pools);
    row.near.release(pools);
    const bool noted = row.noted, tagged = row.tagged;
    const DeviceList list{row.list.memory, row.list.capacity, 0, 0};
    row = Row{};
    row.noted = noted;
    row.tagged = tagged;
    row.list = list;
}

void positions(const Row& row, Pools& pools, int32_t* out) {
    for (int e = 0; e < row.entries(); ++e) {
        const int32_t* pos = pool_of(pools, row.page[e]).positions(row.page[e]);
        for (uint16_t m = row.alive[e]; m; m &= m - 1) *out++ = pos[std::countr_zero(m)];
    }
}

}  // namespace kvstrata::pages
