// The walk of score_window and measure: a row's window queries over its pages, cut into units of work.
//
// A unit is a chunk of a row's entries for all its queries, taken one block of query heads at a time, so that memory is
// bounded by W and D. The cut depends on the row alone, and so do the bits.
#pragma once

#include "common/layout.h"
#include "cpu/isa.h"
#include "cpu/merge.h"
#include "ops/window.h"

namespace kvstrata::cpu {

struct WindowPart {      // of one row
    int32_t first_unit;  // of the call
    int32_t units;
    int64_t partials;  // f32 index: [units, partial floats]
    int64_t lse;       // f32 index: [G * T]
    int64_t past;      // slots of the past, where the op counts them
};

struct WindowScratch {                               // of one thread; B rows are the queries of a block of heads
    float *q, *z, *sum, *maximum, *decoded, *lanes;  // [B, D'], [B, 16], [B, 16], [B], [2, 16 * D'], [G, 4, 16]
    uint16_t *masks, *query_masks;                   // [B], [T]
    QueryCodes query;                                // of B rows, once a quantized page is met
};

class WindowPlan {
  public:
    // Fills params.workspace. `head_sums`: floats that a unit keeps of each head in the second pass.
    WindowPlan(const ops::WindowParams& params, int head_sums);
    static int64_t bytes(const ops::WindowParams& params, int head_sums);

    int units() const { return units_; }
    int threads() const;  // that its work is worth
    int row_of(int unit) const;
    WindowPart& part(int row) const { return parts_[row]; }
    float* partial(int row, int unit) const;  // [max(T, head_sums) * G] of unit 0, 1, ... of the row
    float* lse(int row) const { return floats_ + parts_[row].lse; }
    WindowScratch scratch(int worker) const;

  private:
    const ops::WindowParams& p_;
    const int head_sums_;
    int units_ = 0;
    WindowPart* parts_;
    float* floats_;
    unsigned char* scratch_;
};

// Positions of slots that count: from <= pos < until.
struct PositionRange {
    int64_t from = INT64_MIN, until = INT64_MAX;
};

// One unit of a call, and what both passes do on it.
class WindowUnit {
  public:
    WindowUnit(const ops::WindowParams& params, const WindowPlan& plan, const Kernels& kernels, int unit, int worker);

    const ops::WindowRow& row() const { return row_; }
    int row_index() const { return r_; }
    int begin() const { return begin_; }
    int end() const { return end_; }
    float* partial() const { return plan_.partial(r_, index_); }
    const WindowScratch& scratch() const { return s_; }

    // Calls block(first head, heads) for each block of heads, its queries loaded.
    template <class Block>
    void each_block(Block block) {
        for (int head = 0; row_.queries && head < p_.group; head += heads_) {
            const int heads = head + heads_ < p_.group ? heads_ : p_.group - head;
            load(head, heads);
            block(head, heads);
        }
    }
    // z [heads, T, 16] of the loaded block at an entry; false, and nothing written, if no query reads a slot.
    bool logits(int entry, int heads, PositionRange range);

    // First pass: log-sum-exps of all queries over the unit's entries, [G, T], to partial().
    void sum_up(PositionRange range);

  private:
    void load(int head, int heads);
    void encode(int rows);
    uint16_t masks(int entry, PositionRange range);

    const ops::WindowParams& p_;
    const WindowPlan& plan_;
    const Kernels& kernels_;
    const int r_;
    const ops::WindowRow& row_;
    const int index_;
    const WindowScratch s_;
    const int stride_, heads_;
    int begin_, end_;
    bool encoded_ = false;  // the loaded queries, for quantized pages
};

// Between the passes: a row's log-sum-exps [G, T] from its units' in order, with sink logits [G] or null.
void merge_lse(const ops::WindowParams& params, const WindowPlan& plan, int row, const float* sinks);

// Slots of an entry that are visible and in the range.
uint16_t slots_in(const ops::WindowParams& params, const ops::WindowRow& row, int entry, PositionRange range);

}  // namespace kvstrata::cpu
