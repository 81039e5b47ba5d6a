#include "ops/score_window.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/window.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

// Second pass over a unit: shares of every slot, reduced over the queries.
class Scorer {
  public:
    Scorer(const ops::ScoreWindowParams& params, const WindowPlan& plan, const Kernels& kernels, int unit, int worker)
        : p_(params), plan_(plan), kernels_(kernels), unit_(params, plan, kernels, unit, worker) {}

    void run() {
        for (int g = 0; g < p_.group; ++g) {
            std::fill_n(slots(g, unit_.begin()), (unit_.end() - unit_.begin()) * kSlots, 0.0f);
        }
        unit_.each_block([&](int head, int heads) {
            for (int e = unit_.begin(); e < unit_.end(); ++e) {
                if (!unit_.logits(e, heads, {})) continue;
                for (int g = 0; g < heads; ++g) score(head + g, unit_.scratch().z + lines(g), slots(head + g, e));
            }
        });
    }

  private:
    int64_t lines(int head) const { return static_cast<int64_t>(head) * unit_.row().queries * kSlots; }
    float* slots(int head, int entry) const {
        return p_.score + unit_.row_index() * p_.score_stride_r + head * p_.score_stride_g +
               static_cast<int64_t>(entry) * kSlots;
    }

    void score(int head, float* z, float* out) {
        const int queries = unit_.row().queries;
        const float* const lse = plan_.lse(unit_.row_index()) + head * queries;
        float* const variance = p_.spread == ops::Spread::none ? nullptr : unit_.scratch().lanes;
        kernels_.share_moments(z, lse, queries, out, variance);
        for (int i = 0; variance && i < kSlots; ++i) {
            out[i] += p_.weight * (p_.spread == ops::Spread::std ? std::sqrt(variance[i]) : variance[i]);
        }
    }

    const ops::ScoreWindowParams& p_;
    const WindowPlan& plan_;
    const Kernels& kernels_;
    WindowUnit unit_;
};

void write_lse(const ops::ScoreWindowParams& p, const WindowPlan& plan, int r) {
    const int queries = p.rows[r].queries;
    for (int g = 0; g < p.group; ++g) {
        std::copy_n(plan.lse(r) + g * queries, queries, p.lse + r * p.lse_stride_r + g * p.lse_stride_g);
    }
}

}  // namespace

int64_t score_window_workspace_bytes(const ops::ScoreWindowParams& params) { return WindowPlan::bytes(params, 0); }

void score_window(const ops::ScoreWindowParams& p) {
    if (!p.n_rows) return;
    const Kernels& k = kernels();
    const WindowPlan plan(p, 0);
    parallel(plan.units(), plan.threads(),
             [&](int64_t unit, int worker) { WindowUnit(p, plan, k, static_cast<int>(unit), worker).sum_up({}); });
    parallel(p.n_rows, plan.threads(), [&](int64_t r, int) {
        merge_lse(p, plan, static_cast<int>(r), p.rows[r].sinks);
        write_lse(p, plan, static_cast<int>(r));
    });
    parallel(plan.units(), plan.threads(),
             [&](int64_t unit, int worker) { Scorer(p, plan, k, static_cast<int>(unit), worker).run(); });
}

}  // namespace kvstrata::cpu
