#include "ops/score_pages.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>

#include "common/check.h"
#include "common/layout.h"
#include "cpu/isa.h"
#include "cpu/merge.h"
#include "cpu/parallel.h"
#include "ops/backends.h"
#include "ops/supported.h"

namespace kvstrata::cpu {
namespace {

constexpr int kAhead = 4;  // blocks: one is sooner scored than fetched

int padded_entries(int entries) { return (entries + kSlots - 1) / kSlots * kSlots; }

int64_t longest(const ops::SelectParams& p) {
    int64_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) most = std::max<int64_t>(most, padded_entries(p.rows[r].entries));
    return most;
}

// What a thread works in, for rows of up to `entries` (padded) entries.
struct Scratch {
    float *log_count, *x, *vote, *rotated;
    int16_t* pairs;
    int8_t* codes;
    int64_t bytes;

    Scratch(const ops::SelectParams& p, int64_t entries, int worker) {
        int64_t at = 0;
        const auto take = [&](int64_t size) {
            const int64_t from = at;
            at += (size + 63) / 64 * 64;
            return from;
        };
        const int64_t head = static_cast<int64_t>(p.group) * p.head_dim;
        const int64_t places[] = {take(4 * entries), take(4 * entries * p.group),
                                  take(4 * entries), take(4 * head),
                                  take(2 * head),    take(head)};
        bytes = at;
        unsigned char* const base = static_cast<unsigned char*>(p.workspace) + worker * bytes;
        log_count = reinterpret_cast<float*>(base + places[0]);
        x = reinterpret_cast<float*>(base + places[1]);
        vote = reinterpret_cast<float*>(base + places[2]);
        rotated = reinterpret_cast<float*>(base + places[3]);
        pairs = reinterpret_cast<int16_t*>(base + places[4]);
        codes = reinterpret_cast<int8_t*>(base + places[5]);
    }
};

// The log of how many slots a mask has.
constexpr float kLogCount[kSlots + 1] = {kMinusInf,   0.0f,        0.693147182f, 1.09861231f, 1.38629436f, 1.60943794f,
                                         1.79175949f, 1.9459101f,  2.07944155f,  2.19722462f, 2.30258512f, 2.39789534f,
                                         2.48490667f, 2.56494927f, 2.6390574f,   2.70805025f, 2.77258873f};

class Selection {
  public:
    Selection(const ops::SelectParams& params, ops::SelectRow& row, const Scratch& scratch)
        : p_(params), row_(row), w_(scratch), padded_(padded_entries(row.entries)) {}

    // The entry whose x is not finite, or -1.
    int run(bool choose) {
        row_.count = 0;
        encode();
        score();
        if (row_.x) {
            for (int g = 0; g < p_.group; ++g) {
                std::copy_n(w_.x + static_cast<int64_t>(g) * padded_, row_.entries,
                            row_.x + static_cast<int64_t>(g) * row_.entries);
            }
        }
        if (const int bad = unordered(); bad >= 0) return bad;
        if (!choose) return -1;
        vote();
        pick();
        if (row_.lse_rest) rest();
        return -1;
    }

  private:
    float* x_of(int g) const { return w_.x + static_cast<int64_t>(g) * padded_; }

    // R q of every head as codes, and what its logits are multiplied by.
    void encode() {
        const int dim = p_.head_dim;
        for (int g = 0; g < p_.group; ++g) {
            float* const q = w_.rotated + static_cast<int64_t>(g) * dim;
            const auto* const from =
                static_cast<const unsigned char*>(row_.q) + g * row_.q_stride_g * dtype_bytes(p_.q_dtype);
            kernels_.convert(q, DType::f32, from, p_.q_dtype, dim);
            const float square = kernels_.dot_product(q, q, dim);
            kernels_.rotate(q, dim, false);
            float most = 0.0f;
            for (int d = 0; d < dim; ++d) most = std::max(most, std::abs(q[d]));
            const float delta = most / 127.0f, by = delta > 0.0f ? 1.0f / delta : 0.0f;
            int8_t* const codes = w_.codes + static_cast<int64_t>(g) * dim;
            int16_t* const pairs = w_.pairs + static_cast<int64_t>(g) * dim;
            constexpr int kOrder[4] = {0, 2, 1, 3};
            int32_t sum = 0;
            for (int d = 0; d < dim; ++d) {
                codes[d] = static_cast<int8_t>(std::clamp(std::nearbyint(q[d] * by), -127.0f, 127.0f));
                sum += codes[d];
            }
            for (int d = 0; d < dim; ++d) pairs[d] = codes[d / 4 * 4 + kOrder[d % 4]];
            shift_[g] = kZeroCode * sum;
            factor_[g] = p_.scale * delta + (square - square);  // NaN and Inf of the query show
            curvature_[g] = 0.5f * p_.weight * p_.scale * p_.scale * square;
        }
    }

    void score() {
        for (int e = 0; e < padded_; ++e) {
            w_.log_count[e] =
                e >= row_.first && e < row_.entries ? kLogCount[std::popcount(row_.visible[e])] : kMinusInf;
        }
        const PageQuery query{w_.codes, w_.pairs, shift_, factor_, curvature_, p_.group, p_.head_dim};
        for (int b = 0; b < padded_ / kSlots; ++b) {
            const unsigned char* const ahead = row_.blocks[std::min(b + kAhead, padded_ / kSlots - 1)];
            kernels_.score_block(query, row_.blocks[b], ahead, w_.log_count + b * kSlots, w_.x + b * kSlots, padded_);
        }
    }

    // The first entry that cannot be ranked, or -1.
    int unordered() const {
        for (int g = 0; g < p_.group; ++g) {
            const float* const x = x_of(g);
            int bad = 0;
            for (int e = 0; e < padded_; ++e) {
                bad |= !(std::abs(x[e]) <= std::numeric_limits<float>::max()) & (w_.log_count[e] != kMinusInf);
            }
            for (int e = 0; bad && e < row_.entries; ++e) {
                if (!std::isfinite(x[e]) && w_.log_count[e] != kMinusInf) return e;
            }
        }
        return -1;
    }

    void vote() {
        std::fill_n(w_.vote, padded_, 0.0f);
        for (int g = 0; g < p_.group; ++g) {
            float* const x = x_of(g);
            const float base = row_.lse_base ? row_.lse_base[g] : kMinusInf;
            largest_[g] = kernels_.largest(x, padded_);
            if (largest_[g] == kMinusInf) {
                std::fill_n(x, padded_, 0.0f);
                continue;
            }
            const float total = kernels_.exp_sum(x, largest_[g], padded_);
            const float all = total + std::exp(base - largest_[g]);  // may be inf: then nothing here counts
            add(x, all > 0.0f ? 1.0f / all : 0.0f);
        }
        for (int e = 0; e < padded_; ++e) {
            if (w_.log_count[e] == kMinusInf) w_.vote[e] = -1.0f;
        }
    }

    void add(const float* e, float by) {
        if (p_.aggregate == ops::Aggregate::sum) return kernels_.axpy(w_.vote, e, by, padded_);
        for (int i = 0; i < padded_; ++i) w_.vote[i] = std::max(w_.vote[i], e[i] * by);
    }

    // The best so far stand in falling order of vote, ties by index: a later one must be above the last of them.
    void pick() {
        if (!row_.selected || row_.most == 0) return;
        int32_t* const best = row_.selected;
        const int most = row_.most;
        int n = 0;
        const float below = -0.5f;  // of what is hidden: -1
        for (int e = 0;; ++e) {
            const float least = n < most ? below : w_.vote[best[n - 1]];
            e = kernels_.next_above(w_.vote, e, padded_, least);
            if (e == padded_) break;
            int at = n < most ? n++ : n - 1;
            for (; at > 0 && w_.vote[best[at - 1]] < w_.vote[e]; --at) best[at] = best[at - 1];
            best[at] = e;
        }
        std::sort(best, best + n);
        std::fill(best + n, best + most, -1);
        row_.count = n;
    }

    void rest() {
        for (int g = 0; g < p_.group; ++g) {
            float* const x = x_of(g);
            for (int i = 0; i < row_.count; ++i) x[row_.selected[i]] = 0.0f;
            const float total = kernels_.sum(x, padded_);
            row_.lse_rest[g] = total > 0.0f ? largest_[g] + std::log(total) : kMinusInf;
        }
    }

    const ops::SelectParams& p_;
    ops::SelectRow& row_;
    const Scratch& w_;
    const Kernels& kernels_ = kernels();
    const int padded_;
    int32_t shift_[ops::kMaxGroup];
    float factor_[ops::kMaxGroup], curvature_[ops::kMaxGroup], largest_[ops::kMaxGroup];
};

void run(const char* op, const ops::SelectParams& p, bool choose) {
    const int64_t entries = longest(p);
    std::atomic<int64_t> bad{-1};  // row * 2^32 + entry, the first row's
    parallel(p.n_rows, p.threads, [&](int64_t r, int worker) {
        const int entry = Selection(p, p.rows[r], Scratch(p, entries, worker)).run(choose);
        if (entry < 0) return;
        const int64_t place = r << 32 | entry;
        int64_t now = bad.load();
        while ((now < 0 || place < now) && !bad.compare_exchange_weak(now, place)) {
        }
    });
    const int64_t place = bad.load();
    check(place < 0, op, ": the logits of row ", place >> 32, ", entry ", place & 0xFFFFFFFF,
          " are not finite, expected finite keys and queries");
}

}  // namespace

int64_t select_workspace_bytes(const ops::SelectParams& p) {
    return Scratch(p, longest(p), 0).bytes * std::max(1, std::min(p.threads, p.n_rows));
}

void select(const ops::SelectParams& p) { run("select", p, true); }
void score_pages(const ops::SelectParams& p) { run("score_pages", p, false); }

}  // namespace kvstrata::cpu
