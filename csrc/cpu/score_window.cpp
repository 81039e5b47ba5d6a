#include "ops/score_window.h"

#include <algorithm>
#include <cmath>

#include "cpu/window.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

// Second pass over a unit: shares of every slot that some query reads, reduced over the queries.
void score_unit(const ops::ScoreWindowParams& p, const Kernels& k, const WindowUnit& unit) {
    const int queries = unit.row().queries;
    const WindowHead& head = *unit.found().head;
    float* const variance = p.spread == ops::Spread::none ? nullptr : unit.scratch().sums;
    unit.find_factors(1.0f);
    for (int i = 0; i < head.count; ++i) {
        for (int h = 0; h < unit.heads(); ++h) {
            float* const out = p.score + unit.row_index() * p.score_stride_r + (unit.head() + h) * p.score_stride_g +
                               static_cast<int64_t>(head.entries[i]) * kSlots;
            k.share_moments(unit.shares(i, h), unit.scratch().factor + h * queries, queries, head.slots[i], out,
                            variance);
            for (int slot = 0; variance && slot < kSlots; ++slot) {
                out[slot] += p.weight * (p.spread == ops::Spread::std ? std::sqrt(variance[slot]) : variance[slot]);
            }
        }
    }
}

// Of some heads of a row, or of all where it has no unit.
void merge(const ops::ScoreWindowParams& p, const WindowPlan& plan, int r, int head, int heads) {
    merge_lse(p, plan, r, head, heads, p.rows[r].sinks);
    for (int g = head; g < head + heads; ++g) {
        std::copy_n(plan.lse(r, g), p.rows[r].queries, p.lse + r * p.lse_stride_r + g * p.lse_stride_g);
    }
}

// What holds of slots that no query reads.
void clear_row(const ops::ScoreWindowParams& p, const WindowPlan& plan, int r) {
    for (int g = 0; g < p.group; ++g) {
        std::fill_n(p.score + r * p.score_stride_r + g * p.score_stride_g,
                    static_cast<int64_t>(p.rows[r].entries) * kSlots, 0.0f);
    }
    if (!plan.part(r).chunks) merge(p, plan, r, 0, p.group);
}

}  // namespace

int64_t score_window_workspace_bytes(const ops::ScoreWindowParams& params) { return WindowPlan::bytes(params, 0); }

void score_window(const ops::ScoreWindowParams& p) {
    if (!p.n_rows) return;
    const Kernels& k = kernels();
    const WindowPlan plan(p, 0);
    parallel(p.n_rows, plan.threads(), [&](int64_t r, int) { clear_row(p, plan, static_cast<int>(r)); });
    plan.run([&](const WindowWave& wave, int unit,
                 int worker) { WindowUnit(p, plan, k, wave, unit, worker).sum_up({}, false); },
             [&](int r, int head, int heads) { merge(p, plan, r, head, heads); },
             [&](const WindowWave& wave, int index, int worker) {
                 WindowUnit unit(p, plan, k, wave, index, worker);
                 unit.find_again({}, false);
                 score_unit(p, k, unit);
             });
}

}  // namespace kvstrata::cpu
