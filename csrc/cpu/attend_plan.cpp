#include "cpu/attend_plan.h"

#include <algorithm>
#include <bit>
#include <new>

namespace kvstrata::cpu {
namespace {

constexpr int kMinChunk = 8, kMaxChunk = 64;  // entries
constexpr int kChunksWanted = 64;             // of a row, as long as chunks stay within those bounds

int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int chunk_of(int entries) {
    const int wanted = static_cast<int>(std::bit_floor(static_cast<unsigned>(entries / kChunksWanted)));
    return std::clamp(wanted, kMinChunk, kMaxChunk);
}

// Most chunks that a row of up to `entries` entries can have. A list without its trailing -1 may have more chunks than
// with them; this bound only grows with `entries`, so a workspace can be sized once by capacity.
int64_t most_chunks(int entries) {
    const auto cuts = [&](int chunk) { return (static_cast<int64_t>(entries) + chunk - 1) / chunk; };
    return std::max<int64_t>(1, std::max(cuts(kMaxChunk), std::min<int64_t>(2 * kChunksWanted, cuts(kMinChunk))));
}

int64_t query_rows(const ops::AttendParams& p, int r) { return static_cast<int64_t>(p.rows[r].queries) * p.group; }
bool is_split(int64_t query_rows) { return query_rows <= kTileRows; }

int64_t partial_floats(int64_t rows, int stride) { return round64(rows * (stride + 1) * 4) / 4; }

int tile_rows(const ops::AttendParams& p) {
    int64_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) most = std::max(most, query_rows(p, r));
    return static_cast<int>(std::min<int64_t>(most, kTileRows));
}

int pitch_of(int stride) { return (stride + 31) / 32 * 32; }
int64_t block_bytes(int stride) { return static_cast<int64_t>(kBlock) * 32 * stride; }
int64_t operand_bytes(int64_t rows, int stride) {
    if (rows < kMatrixRows) return 0;
    return rows * pitch_of(stride) * 4 + block_bytes(stride) + 2 * round64(rows * stride) + round64(rows);
}

int64_t scratch_bytes(int rows, int stride, bool matrix) {
    const int64_t lanes = kSlots + 2 * kBlock * kSlots;
    const int64_t floats = static_cast<int64_t>(rows) * (2 * stride + lanes) + kSlots * stride;
    const int64_t rotated = static_cast<int64_t>(rows) * stride * 6;  // and codes
    return round64(floats * 4) + round64(rotated) + 4 * round64(rows * 4) + 2 * round64(rows * 2) +
           round64(rows * 2 * kBlock) + (matrix ? operand_bytes(rows, stride) : 0);
}

int trimmed(const ops::AttendRow& row) {
    int entries = row.entries;
    while (entries > 0 && row.pages[entries - 1] < 0) --entries;
    return entries;
}

}  // namespace

int64_t Plan::bytes(const ops::AttendParams& p, bool matrix) {
    const int stride = padded_dim(p.head_dim);
    int64_t partials = 0;
    for (int r = 0; r < p.n_rows; ++r) {
        const int64_t rows = query_rows(p, r);
        if (rows && is_split(rows)) partials += most_chunks(p.rows[r].entries) * partial_floats(rows, stride);
    }
    return round64(static_cast<int64_t>(p.n_rows) * static_cast<int64_t>(sizeof(RowPlan))) + partials * 4 +
           scratch_bytes(tile_rows(p), stride, matrix) * std::max(1, p.threads);
}

Plan::Plan(const ops::AttendParams& p, bool matrix)
    : n_rows_(p.n_rows),
      stride_(padded_dim(p.head_dim)),
      tile_rows_(tile_rows(p)),
      matrix_(matrix),
      rows_(static_cast<RowPlan*>(p.workspace)) {
    int64_t floats = 0;
    for (int r = 0; r < n_rows_; ++r) {
        RowPlan& row = *new (rows_ + r) RowPlan{};
        const int64_t rows = query_rows(p, r);
        row.first_unit = units_;
        row.split = is_split(rows);
        row.entries = trimmed(p.rows[r]);
        row.chunk = chunk_of(row.entries);
        row.partials = floats;
        row.units = !rows       ? 0
                    : row.split ? std::max(1, (row.entries + row.chunk - 1) / row.chunk)
                                : static_cast<int>((rows + kTileRows - 1) / kTileRows);
        row.left.store(row.units, std::memory_order_relaxed);
        if (row.split) floats += row.units * partial_floats(rows, stride_);
        units_ += row.units;
        work_ += row.entries * ((rows + 15) / 16);
    }
    unsigned char* const base = static_cast<unsigned char*>(p.workspace);
    partials_ = reinterpret_cast<float*>(base + round64(n_rows_ * static_cast<int64_t>(sizeof(RowPlan))));
    scratch_ = reinterpret_cast<unsigned char*>(partials_ + floats);
}

int Plan::row_of(int unit) const {
    const RowPlan* after =
        std::upper_bound(rows_, rows_ + n_rows_, unit, [](int u, const RowPlan& row) { return u < row.first_unit; });
    return static_cast<int>(after - rows_) -
           1;  // rows without units share their first_unit with the next: the last wins
}

float* Plan::partial(const RowPlan& row, int unit, int rows) const {
    return partials_ + row.partials + unit * partial_floats(rows, stride_);
}
float* Plan::partial_lse(const RowPlan& row, int unit, int rows) const {
    return partial(row, unit, rows) + static_cast<int64_t>(rows) * stride_;
}

Scratch Plan::scratch(int worker) const {
    unsigned char* at = scratch_ + worker * scratch_bytes(tile_rows_, stride_, matrix_);
    const auto take = [&at](int64_t bytes) {
        unsigned char* const part = at;
        at += bytes;
        return part;
    };
    const auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(n * 4)); };
    const auto lanes = [&](int64_t n) { return reinterpret_cast<uint16_t*>(take(round64(n * 2))); };
    const int64_t rows = tile_rows_;
    Scratch s{};
    s.q = floats(rows * stride_);
    s.acc = floats(rows * stride_);
    s.decoded = floats(static_cast<int64_t>(kSlots) * stride_);
    s.sum = floats(rows * kSlots);
    s.z = floats(rows * kBlock * kSlots);
    s.p = floats(rows * kBlock * kSlots);
    s.maximum = floats(round64(rows * 4) / 4);
    s.rescale = floats(round64(rows * 4) / 4);
    s.live = lanes(rows);
    s.query_masks = lanes(rows);
    s.masks = lanes(rows * kBlock);
    s.query.delta = floats(round64(rows * 4) / 4);
    s.query.centre = floats(round64(rows * 4) / 4);
    s.acc_rotated = floats(rows * stride_);
    s.query.codes = reinterpret_cast<int16_t*>(take(round64(rows * stride_ * 2)));
    if (!matrix_ || rows < kMatrixRows) return s;
    MatrixOperands& o = s.operands;
    o.pitch = pitch_of(stride_);
    o.high = reinterpret_cast<uint16_t*>(take(rows * o.pitch * 2));
    o.low = reinterpret_cast<uint16_t*>(take(rows * o.pitch * 2));
    o.block = take(block_bytes(stride_));
    o.upper = reinterpret_cast<int8_t*>(take(round64(rows * stride_)));
    o.lower = reinterpret_cast<int8_t*>(take(round64(rows * stride_)));
    o.exact = take(round64(rows));
    return s;
}

}  // namespace kvstrata::cpu
