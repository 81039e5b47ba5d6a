// Far pages come Near: what the system holds in memory at once, what the disk has to bring while other work goes on.
//
// Where bytes lie and when they come changes no bit of what is computed: each row is attended to by itself, over the list that
// it has selected, as soon as all of that is there.
#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "common/check.h"
#include "common/fault.h"
#include "ops/merge.h"
#include "ops/supported.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

}  // namespace

// While it lives, pages may be due; those that still are when it ends are given up.
struct Store::Underway {
    Store& store;
    ~Underway() {
        for (const Due& due : store.parts_.due) {
            if (due.ticket.stands()) store.ahead_.copier->give_up(due.ticket);
            if (due.entry >= 0) store.parts_.rows[due.row]->near.leave(due.entry);
        }
        store.parts_.due.clear();
    }
};

void Store::write_far(PageId page, PageId from) {
    pages::Pool& near = pages::pool_of(pools_, from);
    far_[page_pool(page)].write(page, near.payload(from));
    std::copy_n(near.positions(from), kSlots, pages::pool_of(pools_, page).positions(page));
}

void Store::read_far(PageId page, PageId to) {
    pages::Pool& near = pages::pool_of(pools_, to);
    fault::hit("far.read");
    read_page(far_[page_pool(page)].at(page), near.payload(to));
    std::copy_n(pages::pool_of(pools_, page).positions(page), kSlots, near.positions(to));
}

bool Store::any_far(int layer) const {
    if (options_.far.empty() || !indexed(layer)) return false;
    for (const StepSequence& s : step_) {
        for (int h = 0; s.count > 0 && h < layers_[layer].kv_heads; ++h) {
            const pages::Row& row = s.sequence->rows[first_row_[layer] + h];
            if (std::any_of(row.page.begin() + row.aside, row.page.begin() + row.sealed,
                            [&](PageId id) { return far(id); }))
                return true;
        }
    }
    return false;
}

void Store::set_ahead(bool on, std::chrono::milliseconds limit) {
    check(limit.count() >= 1, "set_ahead: limit is ", limit.count(), " ms, expected at least 1");
    ahead_.on = on;
    ahead_.limit = limit;
    stop_reading();
    ahead_.copier.reset();
}

Copier& Store::copier() {
    if (!ahead_.copier) ahead_.copier = std::make_unique<Copier>(ahead_.limit);
    return *ahead_.copier;
}

// The bytes of a Far page into a Near one, for row r of the call: whose copy of `entry` that is, or -1. They are there, or due.
void Store::call_in(PageId page, PageId to, int32_t r, int32_t entry) {
    if (!ahead_.on) return read_far(page, to);
    fault::hit("far.read");
    pages::Pool& near = pages::pool_of(pools_, to);
    std::copy_n(pages::pool_of(pools_, page).positions(page), kSlots, near.positions(to));
    const FarPage from = far_[page_pool(page)].at(page);
    if (read_page_at_once(from, near.payload(to))) return;
    parts_.due.push_back({r, entry, {}});
    const Copy copy{from, near.payload(to), &parts_.due.back().ticket};
    copier().ask({&copy, 1});
}

// Waits for the first n that are due.
void Store::take_due(size_t n) {
    for (size_t i = 0; i < n; ++i) {
        Due& due = parts_.due[i];
        const auto start = std::chrono::steady_clock::now();
        const bool waited = ahead_.copier->take(std::exchange(due.ticket, {}));
        due.entry = -1;  // the copy stands
        ++ahead_.late.pages;
        if (waited)
            ahead_.late.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    parts_.due.erase(parts_.due.begin(), parts_.due.begin() + static_cast<int64_t>(n));
}

// Near copies of the given Far entries of row r of the call. If a page cannot be read, those that are missing have no copy, and
// the error goes on.
void Store::fetch(int32_t r, std::span<const int32_t> entries) {
    if (entries.empty()) return;
    pages::Row& row = *parts_.rows[r];
    std::vector<pages::Miss>& misses = parts_.misses;
    misses.clear();
    misses.reserve(entries.size());  // so that each entry that is given a slot is named here
    pages::Pool& near = pools_[near_of(page_pool(row.page[entries[0]]))];
    size_t called = 0;
    try {
        pages::admit(row.near, row.entries(), entries, options_.recall.near_pages, clock_, near, misses);
        for (; called < misses.size(); ++called) {
            call_in(row.page[misses[called].entry], misses[called].to, r, misses[called].entry);
        }
    } catch (...) {
        for (; called < misses.size(); ++called) row.near.leave(misses[called].entry);
        throw;
    }
    hits_ += static_cast<int64_t>(entries.size() - misses.size());
    misses_count_ += static_cast<int64_t>(misses.size());
}

// The second part of a step of one token, and the third where there is one: what rows have selected, as it comes.
void Store::attend_fetched(int layer, const AttendCall& call) {
    const int n = static_cast<int>(parts_.rows.size());
    bool estimates = options_.recall.estimate > 0.0f;
    const Underway underway{*this};
    for (int first = 0; first < n;) {
        const int end = list_selected(first);
        if (estimates && !parts_.due.empty()) {
            estimate_rest(layer, call);
            estimates = false;
        }
        attend_listed(layer, call, first, end);
        first = end;
    }
    if (estimates) estimate_rest(layer, call);
    if (ahead_.copier) note_sought(layer);
}

// Lists what rows from `first` on have selected; where it is read from files, into Near copies, or, where rows keep none, into
// the ring, for as many rows as that holds. Returns the row after the last one listed.
int Store::list_selected(int first) {
    begin_lists();
    size_t used = 0;
    int r = first;
    for (; r < static_cast<int>(parts_.rows.size()); ++r) {
        pages::Row& row = *parts_.rows[r];
        const ops::SelectRow& chosen = parts_.select[r];
        parts_.far.clear();
        for (int i = 0; i < chosen.count; ++i) {
            if (far(row.page[chosen.selected[i]])) parts_.far.push_back(chosen.selected[i]);
        }
        const bool copies = options_.recall.near_pages > 0;
        if (copies) fetch(r, parts_.far);
        if (!copies && r > first && used + parts_.far.size() > static_cast<size_t>(options_.ring)) break;
        for (int i = 0; i < chosen.count; ++i) {
            const int e = chosen.selected[i];
            PageId page = row.page[e];
            if (far(page) && copies) page = row.near.slots[row.near.slot(e)].page;
            if (far(page)) {
                const PageId stage = ring_of(page_pool(page))[used++];
                call_in(page, stage, r, -1);
                ++misses_count_;
                page = stage;
            }
            list_page(row, e, page);
            if (!parts_.picked.empty())
                parts_.masks.back() = parts_.picked[chosen.selected + i - parts_.selected.data()];
        }
        parts_.ends.push_back(parts_.pages.size());
    }
    return r;
}

// Attends over what rows first..end have listed: those of which all is there, then the others in their order, with each as many
// of the next ones as have come.
void Store::attend_listed(int layer, const AttendCall& call, int first, int end) {
    std::vector<int32_t>& ready = parts_.ready;
    ready.clear();
    auto due = parts_.due.begin();
    for (int32_t r = first; r < end; ++r) {
        if (due == parts_.due.end() || due->row != r) ready.push_back(r);
        while (due != parts_.due.end() && due->row == r) ++due;
    }
    if (!ready.empty()) attend_lists(layer, call, 1, first, ready);
    const auto of_row = [&](size_t i) {  // one past those of the row that the i-th is for
        size_t last = i;
        while (last < parts_.due.size() && parts_.due[last].row == parts_.due[i].row) ++last;
        return last;
    };
    const auto there = [&](const Due& d) { return ahead_.copier->there(d.ticket); };
    while (!parts_.due.empty()) {
        ready.assign(1, parts_.due[0].row);
        size_t n = of_row(0);
        take_due(n);
        while (!parts_.due.empty()) {
            n = of_row(0);
            if (!std::all_of(parts_.due.begin(), parts_.due.begin() + static_cast<int64_t>(n), there)) break;
            ready.push_back(parts_.due[0].row);
            take_due(n);
        }
        attend_lists(layer, call, 1, first, ready);
    }
}

// --- steps of several tokens over Far pages --------------------------------------------------------------------------------------

// Row by row: what is Near, then Far pages, a ring of them at a time, in the order of the table.
void Store::attend_streamed(int layer, const AttendCall& call) {
    begin_parts(layer);
    const int n = static_cast<int>(parts_.whole.size());
    attend_rows_.resize(1);
    for (int r = 0; r < n; ++r) stream_row(layer, call, r);
    settle_workspace(longest_);
    if (longest_ > 1) {  // large, and gone with the prompt
        for (int part = 0; part < 2; ++part) {
            std::vector<float>().swap(parts_.out[part]);
            std::vector<float>().swap(parts_.lse[part]);
        }
    }
}

void Store::stream_row(int layer, const AttendCall& call, int r) {
    const LayerShape& shape = layers_[layer];
    const int group = shape.q_heads / shape.kv_heads, dim = shape.head_dim;
    const ops::AttendRow& whole = parts_.whole[r];
    const pages::Row& row = *parts_.rows[r];
    const int span = whole.tokens[whole.queries - 1] - whole.tokens[0] + 1;
    parts_.tokens.resize(whole.queries);
    for (int t = 0; t < whole.queries; ++t) parts_.tokens[t] = whole.tokens[t] - whole.tokens[0];
    for (int part = 0; part < 2; ++part) {
        parts_.out[part].assign(static_cast<size_t>(span) * group * dim, 0.0f);
        parts_.lse[part].assign(static_cast<size_t>(span) * group, kMinusInf);
    }
    const auto attend = [&](int part) {
        attend_rows_[0] = part_row(r, group, dim, part, 0, parts_.pages.size(), parts_.out[part].data(),
                                   parts_.lse[part].data(), parts_.tokens.data());
        attend_now(layer, call, DType::f32);
    };
    begin_lists();
    parts_.far.clear();
    for (int e = 0; e < row.entries(); ++e) {
        far(row.page[e]) ? parts_.far.push_back(e) : list_page(row, e, row.page[e]);
    }
    const Underway underway{*this};
    attend(0);
    const float* const outs[2] = {parts_.out[0].data(), parts_.out[1].data()};
    const float* const lses[2] = {parts_.lse[0].data(), parts_.lse[1].data()};
    for (size_t first = 0, ring; first < parts_.far.size(); first += ring) {
        const std::vector<PageId>& places = ring_of(page_pool(row.page[parts_.far[first]]));
        ring = std::min(places.size(), parts_.far.size() - first);
        parts_.pages.assign(places.begin(), places.begin() + static_cast<int64_t>(ring));
        parts_.masks.clear();
        for (size_t i = 0; i < ring; ++i) {
            call_in(row.page[parts_.far[first + i]], places[i], r, -1);
            parts_.masks.push_back(row.visible[parts_.far[first + i]]);
        }
        if (!parts_.due.empty()) hint_entries(row, std::span(parts_.far).subspan(first + ring), places.size());
        take_due(parts_.due.size());
        attend(1);
        ops::merge({outs, lses, 2, int64_t{span} * group, dim, parts_.out[0].data(), DType::f32, parts_.lse[0].data(),
                    threads_});
    }
    for (int t = 0; t < whole.queries; ++t) {
        const int64_t at = static_cast<int64_t>(parts_.tokens[t]) * group;
        const float *const out = outs[0] + at * dim, *const lse = lses[0] + at;
        float merged[ops::kMaxGroup];
        write_out(whole, t, {&out, 1}, {&lse, 1}, group, dim, call.out_dtype, merged);
    }
}

// --- hints ------------------------------------------------------------------------------------------------------------------------

// Of a row's entries the first n: that they are read next.
void Store::hint_entries(const pages::Row& row, std::span<const int32_t> entries, size_t n) {
    ahead_.hints.clear();
    for (int32_t e : entries.first(std::min(n, entries.size())))
        ahead_.hints.push_back(far_[page_pool(row.page[e])].at(row.page[e]));
    if (ahead_.copier) ahead_.copier->hint(ahead_.hints);
}

// What each row has selected of Far pages, once a disk had to be waited for.
void Store::note_sought(int layer) {
    size_t r = 0;
    for (const StepSequence& s : step_) {
        s.sequence->sought.resize(n_rows_);
        for (int h = 0; s.count > 0 && h < layers_[layer].kv_heads; ++h, ++r) {
            std::vector<Sought>& sought = s.sequence->sought[first_row_[layer] + h];
            sought.clear();
            const pages::Row& row = *parts_.rows[r];
            for (int i = 0; i < parts_.select[r].count; ++i) {
                const int32_t e = parts_.select[r].selected[i];
                if (far(row.page[e])) sought.push_back({e, row.page[e]});
            }
        }
    }
}

// The next layer that selects mostly reads what it read in the last step: the disk hears of those pages that are not Near.
void Store::hint_next(int layer) {
    if (!ahead_.copier) return;
    int next = layer;
    do next = (next + 1) % static_cast<int>(layers_.size());
    while (!recalls(next));
    ahead_.hints.clear();
    for (const StepSequence& s : step_) {
        for (int h = 0; !s.sequence->sought.empty() && h < layers_[next].kv_heads; ++h) {
            const pages::Row& row = row_of(*s.sequence, next, h);
            for (const Sought& sought : s.sequence->sought[first_row_[next] + h]) {
                const bool stands = sought.entry < row.entries() && row.page[sought.entry] == sought.page;
                if (stands && row.near.slot(sought.entry) < 0)
                    ahead_.hints.push_back(far_[page_pool(sought.page)].at(sought.page));
            }
        }
    }
    ahead_.late.hinted += static_cast<int64_t>(ahead_.hints.size());
    ahead_.copier->hint(ahead_.hints);
}

}  // namespace kvstrata::store
