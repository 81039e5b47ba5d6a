#include "cpu/window.h"

#include <algorithm>

#include "cpu/merge.h"

namespace kvstrata::cpu {
namespace {

const int32_t* positions_of(const ops::WindowParams& p, PageId id) {
    return p.pools[page_pool(id)].positions[page_slab(id)] + page_index(id) * kSlots;
}

// Slots with first <= position <= last.
uint16_t between(const int32_t* positions, int64_t first, int64_t last) {
    const int64_t low = std::max<int64_t>(first, INT32_MIN), high = std::min<int64_t>(last, INT32_MAX);
    if (low > high) return 0;
    const int32_t a = static_cast<int32_t>(low), b = static_cast<int32_t>(high);
    unsigned mask = 0;
    for (int i = 0; i < kSlots; ++i) mask |= static_cast<unsigned>(positions[i] >= a && positions[i] <= b) << i;
    return static_cast<uint16_t>(mask);
}

}  // namespace

void prefetch_positions(const ops::WindowParams& p, const ops::WindowRow& row, int entry) {
    if (entry >= row.entries || row.pages[entry] < 0 || (row.visible && !row.visible[entry])) return;
    __builtin_prefetch(positions_of(p, row.pages[entry]));
}

uint16_t slots_in(const ops::WindowParams& p, const ops::WindowRow& row, int entry, PositionRange range) {
    if (row.pages[entry] < 0) return 0;
    const uint16_t visible = row.visible ? row.visible[entry] : kAllSlots;
    if (!visible || (range.from == INT64_MIN && range.until == INT64_MAX)) return visible;
    return visible & between(positions_of(p, row.pages[entry]), range.from, range.until - 1);
}

WindowUnit::WindowUnit(const ops::WindowParams& params, const WindowPlan& plan, const Kernels& kernels,
                       const WindowWave& wave, int unit, int worker)
    : p_(params),
      plan_(plan),
      kernels_(kernels),
      id_(plan.at(unit)),
      part_(plan.part(id_.row)),
      row_(params.rows[id_.row]),
      s_(plan.scratch(worker)),
      found_(plan.found(wave, unit, worker)),
      kept_(wave.kept),
      head_(id_.block * part_.heads),
      heads_(plan.heads(id_.row, id_.block)),
      block_(params, kernels, s_.block, row_, id_.row, head_ * row_.queries, heads_ * row_.queries, part_.rows) {
    if (row_.q_pos) earliest_ = *std::min_element(row_.q_pos, row_.q_pos + row_.queries);
}

// Of every query, to query_masks; returns the union.
uint16_t WindowUnit::masks(int entry, PositionRange range) {
    const uint16_t slots = slots_in(p_, row_, entry, range);
    if (!slots) return 0;
    if (!row_.q_pos) {
        std::fill_n(s_.query_masks, row_.queries, slots);
        return slots;
    }
    prefetch_positions(p_, row_, entry + 1);
    const int32_t* const positions = positions_of(p_, row_.pages[entry]);
    int32_t newest = INT32_MIN;
    for (int i = 0; i < kSlots; ++i) newest = slots >> i & 1 ? std::max(newest, positions[i]) : newest;
    if (newest <= earliest_ && !p_.window) {
        std::fill_n(s_.query_masks, row_.queries, slots);
        return slots;
    }
    uint16_t any = 0;
    for (int t = 0; t < row_.queries; ++t) {
        const int64_t now = row_.q_pos[t], oldest = p_.window ? now - p_.window + 1 : INT64_MIN;
        s_.query_masks[t] = slots & between(positions, oldest, now);
        any |= s_.query_masks[t];
    }
    return any;
}

void WindowUnit::find(PositionRange range, bool moved) {
    block_.load();
    const int begin = id_.chunk * kUnitEntries, end = std::min(row_.entries, begin + kUnitEntries);
    const int64_t stride = static_cast<int64_t>(part_.rows) * kSlots;
    WindowHead& head = *found_.head;
    head.count = 0;
    std::fill_n(s_.block.maxima, stride, kMinusInf);
    for (int e = begin; e < end; ++e) {
        const uint16_t slots = masks(e, range);
        if (!slots) continue;
        const bool more =
            e + 1 < end && (!row_.visible || row_.visible[e + 1]);  // ids of hidden entries may be anything
        for (int h = 0; h < heads_; ++h) std::copy_n(s_.query_masks, row_.queries, s_.block.masks + h * row_.queries);
        block_.visit(row_.pages[e], more ? row_.pages[e + 1] : -1, found_.e + head.count * stride);
        head.entries[head.count] = e, head.slots[head.count] = slots;
        ++head.count;
    }
    kernels_.soften_window(found_.e, head.count, part_.rows, s_.block.maxima, found_.maximum, found_.total,
                           moved ? found_.moved : nullptr);
}

void WindowUnit::sum_up(PositionRange range, bool moved) {
    find(range, moved);
    for (int h = 0; h < heads_; ++h) {
        float* const lse = partial(head_ + h);
        for (int t = 0; t < row_.queries; ++t) {
            const int n = h * row_.queries + t;
            lse[t] = found_.total[n] == 0.0f ? kMinusInf : found_.maximum[n] + std::log(found_.total[n]);
        }
    }
}

void WindowUnit::find_again(PositionRange range, bool moved) {
    if (!kept_) find(range, moved);
}

void WindowUnit::find_factors(float times) const {
    for (int h = 0; h < heads_; ++h) {
        const float* const lse = plan_.lse(id_.row, head_ + h);
        for (int t = 0; t < row_.queries; ++t) {
            const int n = h * row_.queries + t;
            s_.factor[n] = found_.total[n] == 0.0f ? 0.0f : std::exp(found_.maximum[n] - lse[t]) * times;
        }
    }
}

}  // namespace kvstrata::cpu
