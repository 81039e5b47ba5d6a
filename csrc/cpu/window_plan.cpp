#include "cpu/window_plan.h"

#include <algorithm>

#include "cpu/merge.h"

namespace kvstrata::cpu {
namespace {

constexpr int kAloneUnits = 2;            // units in all up to which the caller works alone
constexpr int64_t kKeptFloats = 1 << 20;  // a thread, of tiles kept between the passes: about its share of the cache
constexpr int kMostTileRows = 16;         // no level's register tile has more rows, and each has a divisor of it
constexpr int kHeadFloats = (static_cast<int>(sizeof(WindowHead)) + 63) / 64 * 16;
constexpr int kSumLanes = 4 * kSlots;  // floats in which a unit adds up a head

int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }
int64_t line(int64_t floats) { return (floats + 15) / 16 * 16; }  // whole cache lines

int chunks_of(const ops::WindowRow& row) { return (row.entries + kUnitEntries - 1) / kUnitEntries; }
int64_t partial_floats(const ops::WindowRow& row, int head_sums) { return std::max(row.queries, head_sums); }
int64_t row_floats(const ops::WindowParams& p, const ops::WindowRow& row, int head_sums) {
    return line(chunks_of(row) * p.group * partial_floats(row, head_sums)) +
           line(static_cast<int64_t>(p.group) * row.queries);
}

// Query heads that visit a page together: as many as fill kTileRows.
int heads_of(int queries, int group) { return std::clamp(queries ? kTileRows / queries : 1, 1, group); }

int64_t tile_floats(int64_t rows) { return kHeadFloats + 3 * line(rows) + kUnitEntries * kSlots * rows; }
// Not less than a row's tiles, and growing with each of its inputs: a workspace can be sized once by capacity.
int64_t most_tile_floats(const ops::WindowParams& p, const ops::WindowRow& row) {
    const int64_t rows = static_cast<int64_t>(p.group) * (row.queries + kMostTileRows) + kTileRows;
    return chunks_of(row) * (p.group * (kHeadFloats + 48) + (kUnitEntries * kSlots + 3) * rows);
}
int64_t capacity(const ops::WindowParams& p) {
    int64_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) most += most_tile_floats(p, p.rows[r]);
    return std::min(most, kKeptFloats * std::max(1, p.threads)) / 16 * 16;
}

int32_t largest_block(const ops::WindowParams& p) {  // grows with each input, too
    int32_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) {
        const int queries = p.rows[r].queries;
        most = std::max(most, std::min(queries * p.group, std::max(queries, kTileRows)));
    }
    return (most + kMostTileRows - 1) / kMostTileRows * kMostTileRows;
}

// The pieces of a thread's scratch in order; with `base`, where they lie. Returns their bytes.
int64_t lay_out(int64_t rows, int64_t dim, int group, unsigned char* base, WindowScratch& s) {
    Pieces pieces{base};
    s.block.lay_out(pieces, rows, dim);
    pieces.take(s.sums, 4 * group * kSumLanes);
    pieces.take(s.factor, 4 * rows);
    pieces.take(s.tile, 4 * tile_floats(rows));
    pieces.take(s.query_masks, 2 * rows);
    return pieces.bytes;
}
int64_t bytes_of_scratch(const ops::WindowParams& p) {
    WindowScratch none{};
    return lay_out(largest_block(p), padded_dim(p.head_dim), p.group, nullptr, none);
}
int64_t bytes_of_parts(const ops::WindowParams& p) {
    return round64(static_cast<int64_t>(p.n_rows) * static_cast<int64_t>(sizeof(WindowPart)));
}

}  // namespace

int64_t WindowPlan::bytes(const ops::WindowParams& p, int head_sums) {
    int64_t floats = capacity(p);
    for (int r = 0; r < p.n_rows; ++r) floats += row_floats(p, p.rows[r], head_sums);
    return bytes_of_parts(p) + 4 * floats + bytes_of_scratch(p) * std::max(1, p.threads);
}

WindowPlan::WindowPlan(const ops::WindowParams& p, int head_sums)
    : p_(p),
      head_sums_(head_sums),
      capacity_(capacity(p)),
      scratch_bytes_(bytes_of_scratch(p)),
      scratch_rows_(largest_block(p)),
      parts_(static_cast<WindowPart*>(p.workspace)) {
    const int tile_rows = kernels().window_rows;
    int64_t floats = 0, tiles = 0;
    for (int r = 0; r < p.n_rows; ++r) {
        const ops::WindowRow& row = p.rows[r];
        WindowPart& part = parts_[r];
        part = {};
        part.first_unit = units_, part.chunks = chunks_of(row), part.heads = heads_of(row.queries, p.group);
        part.blocks = row.queries ? (p.group + part.heads - 1) / part.heads : 0;
        part.rows = (part.heads * row.queries + tile_rows - 1) / tile_rows * tile_rows;
        part.partials = floats, part.tiles = tiles;
        units_ += part.chunks * part.blocks;
        tiles += part.chunks * part.blocks * tile_floats(part.rows);
        floats += row_floats(p, row, head_sums);
        part.lse = floats - line(static_cast<int64_t>(p.group) * row.queries);
    }
    floats_ = reinterpret_cast<float*>(static_cast<unsigned char*>(p.workspace) + bytes_of_parts(p));
    kept_ = floats_ + floats;
    scratch_ = reinterpret_cast<unsigned char*>(kept_ + capacity_);
    for (int worker = 0; worker < std::max(1, p.threads); ++worker) scratch(worker).block.loaded->row = -1;
}

int WindowPlan::threads() const { return units_ <= kAloneUnits ? 1 : p_.threads; }

int WindowPlan::heads(int row, int block) const {
    return std::min(parts_[row].heads, p_.group - block * parts_[row].heads);
}

WindowUnitId WindowPlan::at(int unit) const {
    const WindowPart* const after = std::upper_bound(parts_, parts_ + p_.n_rows, unit,
                                                     [](int u, const WindowPart& part) { return u < part.first_unit; });
    const WindowPart& part = after[-1];
    const int32_t inside = unit - part.first_unit;
    return {static_cast<int32_t>(after - parts_) - 1, inside / part.chunks, inside % part.chunks};
}

// Blocks from `unit` on, as many as can be kept; or those that cannot be kept even alone.
WindowWave WindowPlan::wave_from(int unit) const {
    WindowWave wave{unit, unit, 0, true};
    for (int64_t floats = 0; wave.end < units_;) {
        const WindowUnitId id = at(wave.end);
        const WindowPart& part = parts_[id.row];
        const int64_t block = part.chunks * tile_floats(part.rows);
        const bool fits = block <= capacity_;
        if (wave.end == unit) wave.kept = fits, wave.tiles = part.tiles + id.block * block;
        if (fits != wave.kept || (fits && floats + block > capacity_)) break;
        floats += block;
        wave.end += part.chunks;
    }
    return wave;
}

float* WindowPlan::partial(int row, int chunk, int head) const {
    const int64_t width = partial_floats(p_.rows[row], head_sums_);
    return floats_ + parts_[row].partials + (static_cast<int64_t>(chunk) * p_.group + head) * width;
}

WindowScratch WindowPlan::scratch(int worker) const {
    WindowScratch s{};
    lay_out(scratch_rows_, padded_dim(p_.head_dim), p_.group, scratch_ + scratch_bytes_ * worker, s);
    return s;
}

WindowFound WindowPlan::found(const WindowWave& wave, int unit, int worker) const {
    const WindowPart& part = parts_[at(unit).row];
    float* to = scratch(worker).tile;
    if (wave.kept) to = kept_ + part.tiles + (unit - part.first_unit) * tile_floats(part.rows) - wave.tiles;
    WindowFound found{};
    found.head = reinterpret_cast<WindowHead*>(to);
    found.maximum = to + kHeadFloats;
    found.total = found.maximum + line(part.rows);
    found.moved = found.total + line(part.rows);
    found.e = found.moved + line(part.rows);
    return found;
}

void merge_lse(const ops::WindowParams& p, const WindowPlan& plan, int r, int head, int heads, const float* sinks) {
    const int queries = p.rows[r].queries, chunks = plan.part(r).chunks;
    for (int g = head; g < head + heads; ++g) {
        float* const lse = plan.lse(r, g);
        for (int t = 0; t < queries; ++t) {
            float most = sinks ? sinks[g] : kMinusInf;
            for (int u = 0; u < chunks; ++u) {
                const float part = plan.partial(r, u, g)[t];
                if (!(part <= most)) most = part;  // a NaN wins, so it shows
            }
            lse[t] = most;
            if (most == kMinusInf) continue;
            float total = sinks ? std::exp(sinks[g] - most) : 0.0f;
            for (int u = 0; u < chunks; ++u) total += std::exp(plan.partial(r, u, g)[t] - most);
            lse[t] = most + std::log(total);
        }
    }
}

}  // namespace kvstrata::cpu
