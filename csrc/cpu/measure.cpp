#include "ops/measure.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/window.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kSums = 4;  // that a unit keeps of each head
// sound: n p log p over slots and queries, and over slots: mean square, variance, m4 / m2. code: variance, kurtosis,
// A log(A + 1e-10).
using Sums = double[kSums];

// The positions of a row's past.
PositionRange past_of(const ops::MeasureParams& p, const ops::WindowRow& row) {
    PositionRange range;
    if (p.which == ops::Stats::sound) range.from = p.skip;
    if (row.queries) range.until = *std::min_element(row.q_pos, row.q_pos + row.queries);
    return range;
}

// What the log-sum-exps run over: sound shares are of the past, the code's of all that a query reads.
PositionRange summed(const ops::MeasureParams& p, const ops::WindowRow& row) {
    return p.which == ops::Stats::sound ? past_of(p, row) : PositionRange{};
}

// Second pass over a unit: the sums of each head, to its partials [G, kSums].
class Measurer {
  public:
    Measurer(const ops::MeasureParams& params, const WindowPlan& plan, const Kernels& kernels, int unit, int worker)
        : p_(params), plan_(plan), kernels_(kernels), unit_(params, plan, kernels, unit, worker) {
        const int64_t n = plan.part(unit_.row_index()).past;
        log_n_ = n ? static_cast<float>(std::log(static_cast<double>(n))) : 0.0f;
    }

    void run() {
        const PositionRange past = past_of(p_, unit_.row());
        float* const lanes = unit_.scratch().lanes;
        std::fill_n(lanes, p_.group * kSums * kSlots, 0.0f);
        unit_.each_block([&](int head, int heads) {
            for (int e = unit_.begin(); e < unit_.end(); ++e) {
                if (!unit_.logits(e, heads, past)) continue;
                for (int g = 0; g < heads; ++g)
                    add_page(head + g, unit_.scratch().z + g * unit_.row().queries * kSlots);
            }
        });
        for (int i = 0; i < p_.group * kSums; ++i) {
            float total = 0.0f;
            for (int lane = 0; lane < kSlots; ++lane) total += lanes[i * kSlots + lane];
            unit_.partial()[i] = total;
        }
    }

  private:
    void add_page(int head, float* z) {
        const int queries = unit_.row().queries;
        const float* const lse = plan_.lse(unit_.row_index()) + head * queries;
        float* const lanes = unit_.scratch().lanes + head * kSums * kSlots;
        if (p_.which == ops::Stats::sound) return kernels_.sound_sums(z, lse, log_n_, queries, lanes);
        kernels_.code_sums(z, lse, queries, lanes);
        for (int i = 0; i < queries * kSlots; ++i) {  // of shares by now
            lanes[2 * kSlots + i % kSlots] += z[i] * std::log(z[i] + 1e-10f);
        }
    }

    const ops::MeasureParams& p_;
    const WindowPlan& plan_;
    const Kernels& kernels_;
    WindowUnit unit_;
    float log_n_;
};

int64_t count_past(const ops::MeasureParams& p, const ops::WindowRow& row) {
    const PositionRange past = past_of(p, row);
    int64_t n = 0;
    for (int e = 0; row.queries && e < row.entries; ++e) n += __builtin_popcount(slots_in(p, row, e, past));
    return n;
}

void finish_sound(const Sums& sums, double n, double queries, float* out) {
    const double entropy = -sums[0] / (n * queries), kappa = sums[3] / sums[2];
    const double most = queries - 2 + 1 / (queries - 1);
    out[0] = n < 2 ? 0.0f : static_cast<float>(entropy / std::log(n));
    out[1] = sums[1] == 0 ? 0.0f : static_cast<float>(sums[2] / sums[1]);
    out[2] = sums[2] == 0 || queries < 3 ? 0.0f : static_cast<float>((kappa - 1) / (most - 1));
}

void finish(const ops::MeasureParams& p, const WindowPlan& plan, int r) {
    for (int head = 0; head < p.group; ++head) {
        float* const out = p.stats + (static_cast<int64_t>(r) * p.group + head) * 3;
        Sums sums = {};
        for (int u = 0; u < plan.part(r).units; ++u) {
            for (int i = 0; i < kSums; ++i) sums[i] += plan.partial(r, u)[head * kSums + i];
        }
        const int64_t n = plan.part(r).past;
        if (!n) {
            std::fill_n(out, 3, 0.0f);
        } else if (p.which == ops::Stats::sound) {
            finish_sound(sums, static_cast<double>(n), p.rows[r].queries, out);
        } else {
            out[0] = static_cast<float>(-sums[2]), out[1] = static_cast<float>(sums[0]);
            out[2] = static_cast<float>(sums[1]);
        }
    }
}

}  // namespace

int64_t measure_workspace_bytes(const ops::MeasureParams& params) { return WindowPlan::bytes(params, kSums); }

void measure(const ops::MeasureParams& p) {
    if (!p.n_rows) return;
    const Kernels& k = kernels();
    const WindowPlan plan(p, kSums);
    parallel(plan.units(), plan.threads(), [&](int64_t index, int worker) {
        WindowUnit unit(p, plan, k, static_cast<int>(index), worker);
        unit.sum_up(summed(p, unit.row()));
    });
    parallel(p.n_rows, plan.threads(), [&](int64_t r, int) {
        const bool whole = p.which == ops::Stats::code;  // a sink logit has no part in shares of the past
        merge_lse(p, plan, static_cast<int>(r), whole ? p.rows[r].sinks : nullptr);
        plan.part(static_cast<int>(r)).past = count_past(p, p.rows[r]);
    });
    parallel(plan.units(), plan.threads(),
             [&](int64_t unit, int worker) { Measurer(p, plan, k, static_cast<int>(unit), worker).run(); });
    parallel(p.n_rows, plan.threads(), [&](int64_t r, int) { finish(p, plan, static_cast<int>(r)); });
}

}  // namespace kvstrata::cpu
