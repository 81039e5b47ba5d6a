#include "ops/estimate.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "common/layout.h"
#include "cpu/merge.h"
#include "cpu/page_scan.h"
#include "cpu/parallel.h"
#include "cpu/places.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kAhead = 4 * kSlots;  // entries of the zone: a block is sooner scored than fetched

struct Part {  // of the zone: what lies in one block
    int32_t block;
    uint16_t lanes;
};

int64_t padded(int64_t count) { return (count + kSlots - 1) / kSlots * kSlots; }

int64_t longest(const ops::EstimateParams& p) {
    int64_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) most = std::max<int64_t>(most, padded(p.rows[r].zone_count));
    return most;
}

// What a thread works in, for zones of up to `entries` (padded) entries.
struct Scratch {
    float *x, *lines;
    Part* parts;
    unsigned char* scan;
    int64_t bytes;

    Scratch(const ops::EstimateParams& p, int64_t entries, void* base) {
        Places places(base);
        x = places.take<float>(entries * p.group);
        lines = places.take<float>(int64_t{kSlots} * p.group);
        parts = places.take<Part>(entries);
        scan = places.take<unsigned char>(PageScan::bytes(p.group, p.head_dim));
        bytes = places.bytes();
    }
};

class Estimate {
  public:
    Estimate(const ops::EstimateParams& params, const ops::EstimateRow& row, const Scratch& scratch)
        : p_(params),
          row_(row),
          w_(scratch),
          stride_(padded(row.zone_count)),
          scan_({params.group, params.head_dim, params.q_dtype, SummaryKind::mean_value, params.scale, params.weight,
                 params.softcap},
                scratch.scan) {}

    // The entry whose x is not finite, or -1.
    int run() {
        scan_.encode(row_.q, row_.q_stride_g);
        if (const int bad = score(); bad >= 0) return bad;
        std::fill_n(row_.out, static_cast<int64_t>(p_.group) * p_.head_dim, 0.0f);
        std::fill_n(row_.lse, p_.group, kMinusInf);
        if (count_ == 0) return -1;
        for (int g = 0; g < p_.group; ++g) {
            std::fill(x_of(g) + count_, x_of(g) + stride_, kMinusInf);
            total_[g] = kernels_.exp_sum(x_of(g), scan_.largest(g), static_cast<int32_t>(stride_));
        }
        add_values();
        for (int g = 0; g < p_.group; ++g) {
            float* const out = row_.out + static_cast<int64_t>(g) * p_.head_dim;
            kernels_.divide(out, total_[g], p_.head_dim);
            kernels_.rotate(out, p_.head_dim, true);
            row_.lse[g] = scan_.largest(g) + std::log(total_[g]);
        }
        return -1;
    }

  private:
    float* x_of(int g) const { return w_.x + g * stride_; }
    const unsigned char* block_of(int i) const {
        return row_.blocks[row_.zone[std::min(i, row_.zone_count - 1)] / kSlots];
    }

    // x [G, count] of the entries that take part, and where they lie. The first that cannot be ranked, or -1.
    int score() {
        for (int i = 0; i < row_.zone_count;) {
            const int b = row_.zone[i] / kSlots;
            const unsigned char *const block = row_.blocks[b], *const ahead = block_of(i + kAhead);
            const auto* const slots = reinterpret_cast<const uint32_t*>(block + value_slots_offset(p_.head_dim));
            uint16_t masks[kSlots] = {};
            for (; i < row_.zone_count && row_.zone[i] / kSlots == b; ++i) {
                const int e = row_.zone[i], lane = e % kSlots;
                if (slots[lane] == row_.visible[e]) masks[lane] = row_.visible[e];
            }
            const uint16_t bad = scan_.score(block, ahead, masks, w_.lines, kSlots);
            if (bad) return b * kSlots + std::countr_zero(bad);
            keep(b, scan_.there());
        }
        return -1;
    }

    void keep(int block, uint16_t lanes) {
        if (!lanes) return;
        const int n = std::popcount(lanes);
        for (int g = 0; g < p_.group; ++g) {
            float* x = x_of(g) + count_;
            for (uint32_t m = lanes; m; m &= m - 1) *x++ = w_.lines[g * kSlots + std::countr_zero(m)];
        }
        w_.parts[parts_++] = {block, lanes};
        count_ += n;
    }

    // out [G, D] += the values, by what each counts.
    void add_values() {
        const int64_t at = values_offset(p_.head_dim);
        for (int i = 0, from = 0; i < parts_; ++i) {
            const auto [b, lanes] = w_.parts[i];
            const unsigned char* const block = row_.blocks[b];
            const unsigned char* const ahead = row_.blocks[w_.parts[std::min(i + 1, parts_ - 1)].block];
            const auto* const scales = reinterpret_cast<const float*>(block + value_scales_offset(p_.head_dim));
            int n = from;
            for (uint32_t m = lanes; m; m &= m - 1, ++n) {
                for (int g = 0; g < p_.group; ++g) x_of(g)[n] *= scales[std::countr_zero(m)];
            }
            kernels_.add_values(block + at, ahead + at, lanes, w_.x + from, stride_, p_.group, p_.head_dim, row_.out);
            from = n;
        }
    }

    const ops::EstimateParams& p_;
    const ops::EstimateRow& row_;
    const Scratch& w_;
    const Kernels& kernels_ = kernels();
    const int64_t stride_;
    int count_ = 0, parts_ = 0;
    PageScan scan_;
    float total_[ops::kMaxGroup];
};

}  // namespace

int64_t estimate_workspace_bytes(const ops::EstimateParams& p) {
    return Scratch(p, longest(p), nullptr).bytes * std::max(1, std::min(p.threads, p.n_rows));
}

void estimate(const ops::EstimateParams& p) {
    const int64_t entries = longest(p), bytes = Scratch(p, entries, nullptr).bytes;
    FirstUnranked unranked;
    parallel(p.n_rows, p.threads, [&](int64_t r, int worker) {
        const Scratch scratch(p, entries, part_of(p.workspace, bytes, worker));
        unranked.note(r, Estimate(p, p.rows[r], scratch).run());
    });
    unranked.refuse("estimate");
}

}  // namespace kvstrata::cpu
