#include "cpu/window.h"

#include <algorithm>

#include "cpu/attend_queries.h"

namespace kvstrata::cpu {
namespace {

constexpr int kUnitEntries = 32;    // entries of a unit
constexpr int kAloneUnits = 2;      // units in all up to which the caller works alone
constexpr int kLanes = 4 * kSlots;  // floats in which a unit adds up a head

int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }
int64_t line(int64_t floats) { return round64(4 * floats) / 4; }  // whole cache lines: threads do not share them

int units_of(const ops::WindowRow& row) { return (row.entries + kUnitEntries - 1) / kUnitEntries; }
int64_t partial_floats(const ops::WindowParams& p, const ops::WindowRow& row, int head_sums) {
    return line(static_cast<int64_t>(p.group) * std::max(row.queries, head_sums));
}

// Query heads that visit a page together: as many as fill a tile.
int heads_of(int queries, int group) { return std::clamp(queries ? kTileRows / queries : 1, 1, group); }

struct Largest {
    int rows = 0, queries = 0;  // of a block; of a row
};
Largest largest(const ops::WindowParams& p) {
    Largest most;
    for (int r = 0; r < p.n_rows; ++r) {
        const int queries = p.rows[r].queries;
        most.queries = std::max(most.queries, queries);
        // Not less than queries * heads_of(queries), and growing with each: a workspace can be sized once by capacity.
        most.rows = std::max(most.rows, std::min(queries * p.group, std::max(queries, kTileRows)));
    }
    return most;
}

int64_t scratch_floats(Largest most, int stride, int group) {
    const int64_t rows = most.rows;
    return line(rows * stride) + 2 * rows * kSlots + line(rows) + 2 * kSlots * stride + group * kLanes;
}
int64_t scratch_bytes(Largest most, int stride, int group) {
    const int64_t rows = most.rows, encoded = 2 * round64(4 * rows) + round64(2 * rows * stride);
    return 4 * scratch_floats(most, stride, group) + encoded + round64(2 * rows) + round64(2 * most.queries);
}

const int32_t* positions_at(const ops::WindowParams& p, const ops::WindowRow& row, int entry) {
    const PageId id = row.pages[entry];
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

uint16_t slots_in(const ops::WindowParams& p, const ops::WindowRow& row, int entry, PositionRange range) {
    if (row.pages[entry] < 0) return 0;
    const uint16_t visible = row.visible ? row.visible[entry] : kAllSlots;
    if (!visible || (range.from == INT64_MIN && range.until == INT64_MAX)) return visible;
    return visible & between(positions_at(p, row, entry), range.from, range.until - 1);
}

int64_t WindowPlan::bytes(const ops::WindowParams& p, int head_sums) {
    int64_t floats = 0;
    for (int r = 0; r < p.n_rows; ++r) {
        const ops::WindowRow& row = p.rows[r];
        floats += units_of(row) * partial_floats(p, row, head_sums) + partial_floats(p, row, 0);
    }
    return round64(static_cast<int64_t>(p.n_rows) * static_cast<int64_t>(sizeof(WindowPart))) + 4 * floats +
           scratch_bytes(largest(p), padded_dim(p.head_dim), p.group) * std::max(1, p.threads);
}

WindowPlan::WindowPlan(const ops::WindowParams& p, int head_sums)
    : p_(p), head_sums_(head_sums), parts_(static_cast<WindowPart*>(p.workspace)) {
    int64_t floats = 0;
    for (int r = 0; r < p.n_rows; ++r) {
        const ops::WindowRow& row = p.rows[r];
        parts_[r] = {units_, units_of(row), floats, 0, 0};
        units_ += parts_[r].units;
        floats += parts_[r].units * partial_floats(p, row, head_sums);
        parts_[r].lse = floats;
        floats += partial_floats(p, row, 0);
    }
    unsigned char* const base = static_cast<unsigned char*>(p.workspace);
    floats_ = reinterpret_cast<float*>(
        base + round64(static_cast<int64_t>(p.n_rows) * static_cast<int64_t>(sizeof(WindowPart))));
    scratch_ = reinterpret_cast<unsigned char*>(floats_ + floats);
}

int WindowPlan::threads() const { return units_ <= kAloneUnits ? 1 : p_.threads; }

int WindowPlan::row_of(int unit) const {
    const WindowPart* after = std::upper_bound(parts_, parts_ + p_.n_rows, unit,
                                               [](int u, const WindowPart& part) { return u < part.first_unit; });
    return static_cast<int>(after - parts_) - 1;
}

float* WindowPlan::partial(int row, int unit) const {
    return floats_ + parts_[row].partials + unit * partial_floats(p_, p_.rows[row], head_sums_);
}

WindowScratch WindowPlan::scratch(int worker) const {
    const Largest most = largest(p_);
    const int stride = padded_dim(p_.head_dim);
    const int64_t rows = most.rows;
    unsigned char* const base = scratch_ + scratch_bytes(most, stride, p_.group) * worker;
    WindowScratch s{};
    s.q = reinterpret_cast<float*>(base);
    s.z = s.q + line(rows * stride);
    s.sum = s.z + rows * kSlots;
    s.maximum = s.sum + rows * kSlots;
    s.decoded = s.maximum + line(rows);
    s.lanes = s.decoded + 2 * kSlots * stride;
    s.query.delta = reinterpret_cast<float*>(base + 4 * scratch_floats(most, stride, p_.group));
    s.query.centre = s.query.delta + line(rows);
    s.query.codes = reinterpret_cast<int16_t*>(s.query.centre + line(rows));
    s.masks = reinterpret_cast<uint16_t*>(s.query.codes) + round64(2 * rows * stride) / 2;
    s.query_masks = s.masks + round64(2 * rows) / 2;
    return s;
}

WindowUnit::WindowUnit(const ops::WindowParams& params, const WindowPlan& plan, const Kernels& kernels, int unit,
                       int worker)
    : p_(params),
      plan_(plan),
      kernels_(kernels),
      r_(plan.row_of(unit)),
      row_(params.rows[r_]),
      index_(unit - plan.part(r_).first_unit),
      s_(plan.scratch(worker)),
      stride_(padded_dim(params.head_dim)),
      heads_(heads_of(row_.queries, params.group)),
      begin_(index_ * kUnitEntries),
      end_(std::min(row_.entries, begin_ + kUnitEntries)) {}

void WindowUnit::load(int head, int heads) {
    const int bytes = dtype_bytes(p_.q_dtype);
    float* q = s_.q;
    encoded_ = false;
    for (int g = head; g < head + heads; ++g) {
        for (int t = 0; t < row_.queries; ++t, q += stride_) {
            const int64_t at = (row_.tokens ? row_.tokens[t] : t) * row_.q_stride_t + g * row_.q_stride_g;
            kernels_.convert(q, DType::f32, static_cast<const char*>(row_.q) + at * bytes, p_.q_dtype, p_.head_dim);
        }
    }
}

// A unit pays for the rotation of its queries once it meets the first quantized page.
void WindowUnit::encode(int rows) {
    AttendTile tile{};
    tile.q = s_.q;
    tile.rows = rows, tile.head_dim = p_.head_dim, tile.stride = stride_;
    tile.query = s_.query;
    encode_queries(kernels_, tile, row_.centre);
    encoded_ = true;
}

// Of every query, to query_masks; returns the union.
uint16_t WindowUnit::masks(int entry, PositionRange range) {
    const uint16_t slots = slots_in(p_, row_, entry, range);
    if (!slots) return 0;
    if (!row_.q_pos) {
        std::fill_n(s_.query_masks, row_.queries, slots);
        return slots;
    }
    const int32_t* const positions = positions_at(p_, row_, entry);
    int32_t newest = INT32_MIN;
    for (int i = 0; i < kSlots; ++i) newest = slots >> i & 1 ? std::max(newest, positions[i]) : newest;
    uint16_t any = 0;
    for (int t = 0; t < row_.queries; ++t) {
        const int64_t now = row_.q_pos[t], oldest = p_.window ? now - p_.window + 1 : INT64_MIN;
        const bool all = newest <= now && !p_.window;
        s_.query_masks[t] = all ? slots : slots & between(positions, oldest, now);
        any |= s_.query_masks[t];
    }
    return any;
}

bool WindowUnit::logits(int entry, int heads, PositionRange range) {
    if (!masks(entry, range)) return false;
    const int rows = heads * row_.queries;
    for (int n = 0; n < rows; n += row_.queries) std::copy_n(s_.query_masks, row_.queries, s_.masks + n);
    const PageId id = row_.pages[entry];
    const Format format = p_.pools[page_pool(id)].format;
    if (!is_full(format) && !encoded_) encode(rows);
    for (int first = 0; first < rows; first += kTileRows) {
        AttendTile tile{};
        tile.q = s_.q + static_cast<int64_t>(first) * stride_;
        tile.z = s_.z + first * kSlots;
        tile.decoded = s_.decoded;
        tile.masks = s_.masks + first;
        tile.rows = std::min(kTileRows, rows - first);
        tile.head_dim = p_.head_dim, tile.stride = stride_;
        tile.scale = p_.scale, tile.softcap = p_.softcap;
        tile.query = {s_.query.codes + static_cast<int64_t>(first) * stride_, s_.query.delta + first,
                      s_.query.centre + first};
        tile.group = is_full(format) ? 0 : group_size(format, p_.head_dim);
        kernels_.logits_page[static_cast<int>(format)](tile, page_at(p_.pools, id), nullptr);
    }
    return true;
}

void WindowUnit::sum_up(PositionRange range) {
    each_block([&](int head, int heads) {
        const int rows = heads * row_.queries;
        std::fill_n(s_.sum, rows * kSlots, 0.0f);
        std::fill_n(s_.maximum, rows, kMinusInf);
        for (int e = begin_; e < end_; ++e) {
            if (logits(e, heads, range)) kernels_.soften_rows(s_.z, rows, s_.maximum, s_.sum);
        }
        float* const lse = partial() + head * row_.queries;
        for (int n = 0; n < rows; ++n) {
            float total = 0.0f;
            for (int lane = 0; lane < kSlots; ++lane) total += s_.sum[n * kSlots + lane];
            lse[n] = total == 0.0f ? kMinusInf : s_.maximum[n] + std::log(total);
        }
    });
}

void merge_lse(const ops::WindowParams& p, const WindowPlan& plan, int r, const float* sinks) {
    const ops::WindowRow& row = p.rows[r];
    const int units = plan.part(r).units;
    float* const lse = plan.lse(r);
    for (int n = 0; n < p.group * row.queries; ++n) {
        float most = sinks ? sinks[n / row.queries] : kMinusInf;
        for (int u = 0; u < units; ++u) {
            const float part = plan.partial(r, u)[n];
            if (!(part <= most)) most = part;  // a NaN wins, so it shows
        }
        lse[n] = most;
        if (most == kMinusInf) continue;
        float total = sinks ? std::exp(sinks[n / row.queries] - most) : 0.0f;
        for (int u = 0; u < units; ++u) total += std::exp(plan.partial(r, u)[n] - most);
        lse[n] = most + std::log(total);
    }
}

}  // namespace kvstrata::cpu
