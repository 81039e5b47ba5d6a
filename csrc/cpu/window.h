// The walk of score_window and measure: one unit of a row's window queries over its pages.
#pragma once

#include <cstdint>

#include "cpu/window_plan.h"

namespace kvstrata::cpu {

// Positions of slots that count: from <= pos < until.
struct PositionRange {
    int64_t from = INT64_MIN, until = INT64_MAX;
};

class WindowUnit {
  public:
    WindowUnit(const ops::WindowParams& params, const WindowPlan& plan, const Kernels& kernels, const WindowWave& wave,
               int unit, int worker);

    const ops::WindowRow& row() const { return row_; }
    int row_index() const { return id_.row; }
    int head() const { return head_; }    // the first,
    int heads() const { return heads_; }  // and how many
    const WindowFound& found() const { return found_; }
    const WindowScratch& scratch() const { return s_; }
    float* partial(int head) const { return plan_.partial(id_.row, id_.chunk, head); }
    // e [T, 16] of the block's head h at an entry that was found.
    float* shares(int found, int h) const {
        return found_.e + (static_cast<int64_t>(found) * part_.rows + static_cast<int64_t>(h) * row_.queries) * kSlots;
    }

    // First pass: what it finds, and the log-sum-exps [T] of each head over the unit's entries to its partial.
    void sum_up(PositionRange range, bool moved);
    // Second pass: what the first found; then the block's factors [heads, T] to scratch().factor: A = factor * e / times.
    void find_again(PositionRange range, bool moved);
    void find_factors(float times) const;

  private:
    void find(PositionRange range, bool moved);
    uint16_t masks(int entry, PositionRange range);

    const ops::WindowParams& p_;
    const WindowPlan& plan_;
    const Kernels& kernels_;
    const WindowUnitId id_;
    const WindowPart& part_;
    const ops::WindowRow& row_;
    const WindowScratch s_;
    const WindowFound found_;
    const bool kept_;
    const int head_, heads_;
    WindowBlock block_;
    int32_t earliest_ = INT32_MAX;  // position of a query
};

// Positions of an entry that will be asked for soon; an entry beyond the last will not.
void prefetch_positions(const ops::WindowParams& params, const ops::WindowRow& row, int entry);

// Slots of an entry that are visible and in the range.
uint16_t slots_in(const ops::WindowParams& params, const ops::WindowRow& row, int entry, PositionRange range);

}  // namespace kvstrata::cpu
