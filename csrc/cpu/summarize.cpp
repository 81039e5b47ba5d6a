#include "ops/summarize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "common/layout.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kUnitItems = 16;  // of one unit of work

// One worker's summary of a page: its keys are widened once, the mean is turned to where it is needed.
class Summary {
  public:
    explicit Summary(const ops::SummarizeParams& params) : p_(params) {}

    void write(const ops::SummaryItem& item) {
        const int dim = p_.head_dim;
        uint8_t* const codes = item.block + 4 * item.lane;
        float* const facts =
            reinterpret_cast<float*>(item.block + static_cast<int64_t>(kSlots) * dim) + item.lane;  // every 16th
        for (int d = 0; d < dim; ++d) code(codes, d) = kZeroCode;
        facts[0] = facts[kSlots] = facts[2 * kSlots] = 0.0f;
        if (item.page < 0 || !item.visible) return;
        const bool full = widen(item);
        const int n = std::popcount(item.visible);
        find_mean(item.visible, n, full);
        float most = 0.0f, total = 0.0f;
        for (int d = 0; d < dim; ++d) most = std::max(most, std::abs(mean_[d])), total += std::abs(mean_[d]);
        if (!std::isfinite(total)) {
            facts[0] = std::numeric_limits<float>::quiet_NaN();
            return;
        }
        const float scale = most / 127.0f, by = scale > 0.0f ? 1.0f / scale : 0.0f;
        for (int d = 0; d < dim; ++d) {
            const float c = std::clamp(std::nearbyint(mean_[d] * by), -127.0f, 127.0f);
            code(codes, d) = static_cast<uint8_t>(static_cast<int>(c) + kZeroCode);
            mean_[d] = scale * c;
        }
        facts[0] = scale;
        if (full) kernels_.rotate(mean_, dim, true);
        measure(item.visible, n, facts[kSlots], facts[2 * kSlots]);
    }

  private:
    static uint8_t& code(uint8_t* codes, int d) { return codes[d / 4 * 4 * kSlots + d % 4]; }

    // The page's keys, those of quantized pages in the rotated domain. Whether it is a full one.
    bool widen(const ops::SummaryItem& item) {
        const Format format = p_.pools[page_pool(item.page)].format;
        const unsigned char* const page = page_at(p_.pools, item.page);
        const bool full = is_full(format);
        const bool centred = !full && item.centre;
        if (centred && item.centre != turned_) {  // pages of a row follow each other
            std::copy_n(item.centre, p_.head_dim, centre_);
            kernels_.rotate(centre_, p_.head_dim, false);
            turned_ = item.centre;
        }
        const uint16_t* const scales =
            full ? nullptr : reinterpret_cast<const uint16_t*>(page + k_scales_offset(format, p_.head_dim));
        float squares[kSlots];
        kernels_.widen_keys[static_cast<int>(format)](page, scales, p_.head_dim,
                                                      full ? 0 : group_size(format, p_.head_dim),
                                                      centred ? centre_ : nullptr, keys_, squares);
        return full;
    }

    // The mean of the visible keys, rotated.
    void find_mean(uint16_t visible, int n, bool full) {
        float ones[kSlots];
        std::fill_n(ones, kSlots, 1.0f);
        std::fill_n(sums_, static_cast<int64_t>(p_.head_dim) * kSlots, 0.0f);
        kernels_.sum_keys(keys_, ones, visible, p_.head_dim, sums_);
        kernels_.fold_keys(sums_, p_.head_dim, mean_);
        kernels_.divide(mean_, static_cast<float>(n), p_.head_dim);
        if (full) kernels_.rotate(mean_, p_.head_dim, false);
    }

    // From the mean as stored, in the domain of the keys.
    void measure(uint16_t visible, int n, float& spread, float& radius) {
        float squares[kSlots], total = 0.0f, most = 0.0f;
        kernels_.distances(keys_, mean_, p_.head_dim, squares);
        for (uint16_t m = visible; m; m &= m - 1) {
            const float square = squares[std::countr_zero(m)];
            total += square;
            most = std::max(most, square);
        }
        spread = total / (static_cast<float>(n) * static_cast<float>(p_.head_dim));
        radius = std::sqrt(most);
    }

    const ops::SummarizeParams& p_;
    const Kernels& kernels_ = kernels();
    const float* turned_ = nullptr;  // the centre that `centre_` is turned from
    alignas(64) float keys_[kMaxHeadDim * kSlots];
    alignas(64) float sums_[kMaxHeadDim * kSlots];
    alignas(64) float mean_[kMaxHeadDim];
    alignas(64) float centre_[kMaxHeadDim];
};

}  // namespace

void summarize(const ops::SummarizeParams& p) {
    parallel((p.n_items + kUnitItems - 1) / kUnitItems, p.threads, [&](int64_t unit, int) {
        Summary summary(p);
        const int end = std::min<int>(p.n_items, (static_cast<int>(unit) + 1) * kUnitItems);
        for (int i = static_cast<int>(unit) * kUnitItems; i < end; ++i) summary.write(p.items[i]);
    });
}

}  // namespace kvstrata::cpu
