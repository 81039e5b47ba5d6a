#include "cpu/window_block.h"

#include <algorithm>
#include <cstring>

#include "cpu/attend_queries.h"

namespace kvstrata::cpu {
namespace {

// One row's words to its place among the rows of a register tile.
void spread(uint32_t* to, const void* from, int words, int row, int tile_rows) {
    to += static_cast<int64_t>(row / tile_rows) * words * tile_rows + row % tile_rows;
    const char* const at = static_cast<const char*>(from);
    for (int i = 0; i < words; ++i) std::memcpy(to + static_cast<int64_t>(i) * tile_rows, at + 4 * i, 4);
}

}  // namespace

void BlockScratch::lay_out(Pieces& pieces, int64_t rows, int64_t dim) {
    pieces.take(loaded, sizeof(BlockLoaded));
    pieces.take(q[kF32], 4 * rows * dim);
    pieces.take(q[kPairs], 2 * rows * dim);
    pieces.take(q[kCodes], 2 * rows * dim);
    pieces.take(delta, 4 * rows);
    pieces.take(centre, 4 * rows);
    pieces.take(maxima, 4 * rows * kSlots);
    pieces.take(decoded, 64 * dim);
    pieces.take(masks, 2 * rows);
}

// Units of a block may follow each other: then a thread has the queries already.
void WindowBlock::load() {
    BlockLoaded& loaded = *s_.loaded;
    if (loaded.row == r_ && loaded.first == first_) return;
    loaded = {r_, first_, {}};
    std::fill_n(s_.masks, rows_, uint16_t{0});
    std::fill_n(s_.delta, rows_, 0.0f);
    std::fill_n(s_.centre, rows_, 0.0f);
}

// The block's queries as operands of a kind, once a page wants them.
void WindowBlock::need(Operand operand) {
    if (s_.loaded->has[operand]) return;
    alignas(64) float q[kMaxHeadDim] = {};
    alignas(64) int16_t narrow[kMaxHeadDim];
    const int dim = p_.head_dim, words = operand == kF32 ? dim : dim / 2;
    std::fill_n(s_.q[operand], static_cast<int64_t>(rows_) * words, 0u);
    for (int i = 0; i < count_; ++i) {
        const int t = (first_ + i) % row_.queries, g = (first_ + i) / row_.queries;
        const int64_t at = (row_.tokens ? row_.tokens[t] : t) * row_.q_stride_t + g * row_.q_stride_g;
        const char* const from = static_cast<const char*>(row_.q) + at * dtype_bytes(p_.q_dtype);
        if (operand == kPairs) {  // bf16 already
            spread(s_.q[operand], from, words, i, kernels_.window_rows);
            continue;
        }
        kernels_.convert(q, DType::f32, from, p_.q_dtype, dim);
        if (operand == kCodes) {
            AttendTile tile{};
            tile.q = q;
            tile.rows = 1, tile.head_dim = dim, tile.stride = padded_dim(dim);
            tile.query = {narrow, s_.delta + i, s_.centre + i};
            encode_queries(kernels_, tile, row_.centre);
        }
        spread(s_.q[operand], operand == kCodes ? static_cast<const void*>(narrow) : q, words, i, kernels_.window_rows);
    }
    s_.loaded->has[operand] = true;
}

void WindowBlock::visit(PageId id, PageId next, float* z) {
    const Format format = p_.pools[page_pool(id)].format;
    const int f = static_cast<int>(format);
    const bool pairs =
        kernels_.window_pairs && format == Format::bf16 && p_.q_dtype == DType::bf16 && p_.head_dim % 2 == 0;
    const Operand operand = !is_full(format) ? kCodes : pairs ? kPairs : kF32;
    need(operand);
    WindowTile tile{};
    tile.q = s_.q[operand];
    tile.delta = s_.delta, tile.centre = s_.centre;
    tile.decoded = s_.decoded;
    tile.masks = s_.masks;
    tile.z = z, tile.maximum = s_.maxima;
    tile.rows = rows_, tile.head_dim = p_.head_dim;
    tile.group = is_full(format) ? 0 : group_size(format, p_.head_dim);
    tile.scale = p_.scale, tile.softcap = p_.softcap;
    // The next page may be of another format: what is fetched ahead is a guess of its length.
    const unsigned char* const ahead = next < 0 || page_pool(next) != page_pool(id) ? nullptr : page_at(p_.pools, next);
    (pairs ? kernels_.window_pairs : kernels_.window_page[f])(tile, page_at(p_.pools, id), ahead);
}

}  // namespace kvstrata::cpu
