// A block of a row's window queries, as the formats of pages read them, and its logits on one page.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/isa.h"
#include "ops/window.h"

namespace kvstrata::cpu {

enum Operand { kF32, kPairs, kCodes, kOperands };  // queries as the formats of pages read them: cpu/kernels.h

// Pieces of one memory in whole cache lines, one after the other.
struct Pieces {
    unsigned char* base;
    int64_t bytes = 0;

    template <class T>
    void take(T*& to, int64_t size) {
        to = reinterpret_cast<T*>(base + bytes);
        bytes += (size + 63) / 64 * 64;
    }
};

struct BlockLoaded {  // whose queries lie in a thread's memory
    int32_t row, first;
    bool has[kOperands];
};
struct BlockScratch {  // of one thread; B: rows of a block, whole register tiles
    BlockLoaded* loaded;
    uint32_t* q[kOperands];  // [B, D'], [B, D' / 2], [B, D' / 2]
    float *delta, *centre;   // [B]
    float* maxima;           // [B, 16] of z, one lane per slot
    unsigned char* decoded;  // [64 * D']
    uint16_t* masks;         // [B]

    void lay_out(Pieces& pieces, int64_t rows, int64_t padded_dim);
};

class WindowBlock {
  public:
    // Queries first .. first + count of the row's [G, T], head by head; rows: those of the block, 0 beyond the queries.
    WindowBlock(const ops::WindowParams& params, const Kernels& kernels, const BlockScratch& scratch,
                const ops::WindowRow& row, int row_index, int first, int count, int rows)
        : p_(params),
          kernels_(kernels),
          s_(scratch),
          row_(row),
          r_(row_index),
          first_(first),
          count_(count),
          rows_(rows) {}

    void load();  // before the first page: masks are 0
    // z [rows, 16] of a page, -inf where masks [rows] have no bit; next: which one is fetched meanwhile, or -1.
    void visit(PageId id, PageId next, float* z);

  private:
    void need(Operand operand);

    const ops::WindowParams& p_;
    const Kernels& kernels_;
    const BlockScratch& s_;
    const ops::WindowRow& row_;
    const int r_, first_, count_, rows_;
};

}  // namespace kvstrata::cpu
