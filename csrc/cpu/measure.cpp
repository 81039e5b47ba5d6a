#include "ops/measure.h"

#include <algorithm>
#include <cmath>

#include "cpu/window.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kSums = 4;   // that a unit keeps of each head
constexpr int kAhead = 8;  // entries whose positions are fetched ahead where nothing else is done with them
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

float sum_lanes(const float* lanes) {
    float total = 0.0f;
    for (int lane = 0; lane < kSlots; ++lane) total += lanes[lane];
    return total;
}

// sum of n p log p over a head's queries: log p = (z - m) + (m - lse).
float entropy_of(const WindowPlan& plan, const WindowUnit& unit, int h) {
    const int queries = unit.row().queries;
    const float* const lse = plan.lse(unit.row_index(), unit.head() + h);
    float sum = 0.0f;
    for (int t = 0, i = h * queries; t < queries; ++t, ++i) {
        const float factor = unit.scratch().factor[i];
        if (factor == 0.0f) continue;
        sum += factor * (unit.found().moved[i] + (unit.found().maximum[i] - lse[t]) * unit.found().total[i]);
    }
    return sum;
}

// sum of A log(A + 1e-10) over a head's queries, to lanes [16].
void add_logs(const float* e, const float* factor, int queries, uint16_t slots, float* lanes) {
    for (int i = 0; i < queries * kSlots; ++i) {
        if (!(slots >> i % kSlots & 1)) continue;
        const float share = e[i] * factor[i / kSlots];
        lanes[i % kSlots] += share * std::log(share + 1e-10f);
    }
}

// Second pass over a unit: the sums of each head, to its partials [kSums].
void sum_unit(const ops::MeasureParams& p, const WindowPlan& plan, const Kernels& k, const WindowUnit& unit) {
    const bool sound = p.which == ops::Stats::sound;
    const int queries = unit.row().queries;
    const WindowHead& head = *unit.found().head;
    const PositionRange past = past_of(p, unit.row());
    std::fill_n(unit.scratch().sums, unit.heads() * kSums * kSlots, 0.0f);
    unit.find_factors(sound ? static_cast<float>(plan.part(unit.row_index()).past) : 1.0f);
    for (int i = 0; i < head.count; ++i) {
        const uint16_t slots = sound ? head.slots[i] : slots_in(p, unit.row(), head.entries[i], past);
        for (int h = 0; slots && h < unit.heads(); ++h) {
            float* const e = unit.shares(i, h);
            float* const lanes = unit.scratch().sums + h * kSums * kSlots;
            const float* const factor = unit.scratch().factor + h * queries;
            if (sound) {
                k.sound_sums(e, factor, queries, lanes + kSlots);
            } else {
                add_logs(e, factor, queries, slots, lanes + 2 * kSlots);
                k.code_sums(e, factor, queries, slots, lanes);
            }
        }
    }
    for (int h = 0; h < unit.heads(); ++h) {
        float* const out = unit.partial(unit.head() + h);
        for (int i = 0; i < kSums; ++i) out[i] = sum_lanes(unit.scratch().sums + (h * kSums + i) * kSlots);
        if (sound) out[0] = entropy_of(plan, unit, h);
    }
}

int64_t count_past(const ops::MeasureParams& p, const ops::WindowRow& row) {
    const PositionRange past = past_of(p, row);
    int64_t n = 0;
    for (int e = 0; row.queries && e < row.entries; ++e) {
        prefetch_positions(p, row, e + kAhead);
        n += __builtin_popcount(slots_in(p, row, e, past));
    }
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
        for (int u = 0; p.rows[r].queries && u < plan.part(r).chunks; ++u) {
            for (int i = 0; i < kSums; ++i) sums[i] += plan.partial(r, u, head)[i];
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
    const bool sound = p.which == ops::Stats::sound;
    parallel(p.n_rows, plan.threads(),
             [&](int64_t r, int) { plan.part(static_cast<int>(r)).past = count_past(p, p.rows[r]); });
    plan.run(
        [&](const WindowWave& wave, int index, int worker) {
            WindowUnit unit(p, plan, k, wave, index, worker);
            unit.sum_up(summed(p, unit.row()), sound);
        },
        [&](int r, int head, int heads) {  // a sink logit has no part in shares of the past
            merge_lse(p, plan, r, head, heads, sound ? nullptr : p.rows[r].sinks);
        },
        [&](const WindowWave& wave, int index, int worker) {
            WindowUnit unit(p, plan, k, wave, index, worker);
            unit.find_again(summed(p, unit.row()), sound);
            sum_unit(p, plan, k, unit);
        });
    parallel(p.n_rows, plan.threads(), [&](int64_t r, int) { finish(p, plan, static_cast<int>(r)); });
}

}  // namespace kvstrata::cpu
