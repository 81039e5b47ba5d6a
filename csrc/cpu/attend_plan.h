// How attend cuts its work and its workspace: which unit of work is which part of which row, and where its data lie.
//
// The cut depends on the row alone (its entries and queries), never on threads or neighbours, and so do the bits.
#pragma once

#include <atomic>

#include "common/layout.h"
#include "cpu/kernels.h"
#include "ops/attend.h"

namespace kvstrata::cpu {

struct RowPlan {
    int32_t first_unit;
    int32_t units;              // split: chunks of entries; otherwise: tiles of query rows
    int32_t entries;            // without trailing -1
    int32_t chunk;              // entries per unit; split rows only
    int64_t partials;           // f32 index of this row's partials; split rows only
    std::atomic<int32_t> left;  // units not yet done; the thread that does the last one merges the row
    bool split;                 // at most kTileRows query rows: units are chunks, each covering all of them
};

// Scratch of one thread, carved from the workspace.
struct Scratch {
    float *q, *acc, *decoded;      // [kTileRows, D'], same, [16 * D']     D' = padded head_dim
    float *maximum, *rescale;      // [kTileRows]
    float *sum, *z, *p;            // [kTileRows, 16], the others [kTileRows, kBlock, 16]
    uint16_t *live, *query_masks;  // [kTileRows]
    uint16_t* masks;               // [kTileRows, kBlock]
    float* acc_rotated;            // [kTileRows, D'] of quantized pages, like `query`
    QueryCodes query;
    MatrixOperands operands;  // from kMatrixRows query rows on, where the level has matrix tiles
};

class Plan {
  public:
    // Fills params.workspace. matrix: whether there is scratch for kernels of matrix tiles.
    Plan(const ops::AttendParams& params, bool matrix);

    static int64_t bytes(const ops::AttendParams& params, bool matrix);

    int units() const { return units_; }
    int64_t work() const { return work_; }  // pages to read, times how many tiles of 16 query rows read each
    int row_of(int unit) const;             // which row a unit belongs to
    RowPlan& row(int r) const { return rows_[r]; }

    float* partial(const RowPlan& row, int unit, int rows) const;      // [rows, D'] normalised
    float* partial_lse(const RowPlan& row, int unit, int rows) const;  // [rows]
    Scratch scratch(int worker) const;

  private:
    int n_rows_, stride_, tile_rows_;
    bool matrix_;
    int units_ = 0;
    int64_t work_ = 0;
    RowPlan* rows_;
    float* partials_;
    unsigned char* scratch_;
};

}  // namespace kvstrata::cpu
