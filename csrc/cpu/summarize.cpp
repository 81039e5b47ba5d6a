#include "ops/summarize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/layout.h"
#include "cpu/isa.h"
#include "cpu/mean_code.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kUnitItems = 16;     // of one unit of work
constexpr int kLine = 4 * kSlots;  // bytes from one word of a lane to the next

constexpr uint16_t kNanBf16 = 0x7FC0;

// One worker's summary of a page: its keys are widened once, the mean is turned to where it is needed.
class Summary {
  public:
    explicit Summary(const ops::SummarizeParams& params) : p_(params) {}

    void write(const ops::SummaryItem& item) {
        const bool seen = item.page >= 0 && item.visible;
        if (seen) full_ = is_full(format_of(item));
        if (p_.kind == SummaryKind::bounds) return write_bounds(item, seen);
        if (is_split(p_.kind)) return write_parts(item, seen);
        write_mean(item, seen);
        if (p_.kind == SummaryKind::mean_value) write_values(item, seen);
    }

  private:
    Format format_of(const ops::SummaryItem& item) const { return p_.pools[page_pool(item.page)].format; }
    static uint8_t byte_of(int c) { return static_cast<uint8_t>(c + kZeroCode); }

    void write_mean(const ops::SummaryItem& item, bool seen) {
        const int dim = p_.head_dim;
        uint8_t* const codes = item.block + 4 * item.lane;
        float* const facts =
            reinterpret_cast<float*>(item.block + static_cast<int64_t>(kSlots) * dim) + item.lane;  // every 16th
        facts[0] = facts[kSlots] = facts[2 * kSlots] = 0.0f;
        if (!seen) {
            for (int d = 0; d < dim; ++d) code_of(codes, d) = kZeroCode;
            return;
        }
        widen(item, !full_ && item.centre);
        const int n = std::popcount(item.visible);
        find_mean(item.visible, n);
        if (full_) kernels_.rotate(mean_, dim, false);
        facts[0] = encode_mean(mean_, dim, 127.0f, false, [codes](int d, int c) { code_of(codes, d) = byte_of(c); });
        if (std::isnan(facts[0])) return;
        if (full_) kernels_.rotate(mean_, dim, true);
        measure(item.visible, n, facts[kSlots], facts[2 * kSlots]);
    }

    void write_parts(const ops::SummaryItem& item, bool seen) {
        const int dim = p_.head_dim, pairs = pairs_of(p_.kind);
        unsigned char* const lane = item.block + 4 * item.lane;
        for (int line = 0; line < pairs * dim / 4; ++line) std::memset(lane + line * kLine, kZeroNibbles, 4);
        unsigned char* const facts = lane + pair_scales_offset(dim, pairs, 0);
        for (int line = 0; line <= 2 * pairs; ++line) std::memset(facts + line * kLine, 0, 4);
        if (!seen) return;
        widen(item, !full_ && item.centre);
        find_mean(item.visible, std::popcount(item.visible));
        const bool finite = std::all_of(mean_, mean_ + dim, [](float x) { return std::isfinite(x); });
        const uint16_t high = finite && pairs == 2 ? second_part(item.visible) : 0;
        uint32_t slots = static_cast<uint32_t>(high) << 16;
        for (int pair = 0; pair < pairs; ++pair) {
            uint16_t* const scales = reinterpret_cast<uint16_t*>(facts + pair * kLine);
            if (!finite) {
                scales[0] = scales[1] = kNanBf16;
                continue;
            }
            uint16_t* const spreads = reinterpret_cast<uint16_t*>(facts + (pairs + pair) * kLine);
            const uint16_t both = pair ? high : item.visible & ~high, second = second_part(both);
            slots |= second;
            for (int i = 0; i < 2; ++i) {
                const uint16_t part = i ? second : both & ~second;
                if (part) write_part(part, 4 * i, lane + pair_offset(dim, pair), scales[i], spreads[i]);
            }
        }
        std::memcpy(facts + 2 * pairs * kLine, &slots, sizeof slots);
    }

    // One part's mean into the nibbles from bit `shift` on.
    void write_part(uint16_t part, int shift, uint8_t* codes, uint16_t& scale, uint16_t& spread) {
        const int dim = p_.head_dim, n = std::popcount(part);
        find_mean(part, n);
        if (full_) kernels_.rotate(mean_, dim, false);
        const float step = encode_mean(mean_, dim, 7.0f, true, [codes, shift](int d, int c) {
            uint8_t& both = code_of(codes, d);
            both = static_cast<uint8_t>((both & 0xF0 >> shift) | (c + kZeroNibble) << shift);
        });
        scale = outwards(step, true);
        if (full_) kernels_.rotate(mean_, dim, true);
        float wide, radius;
        measure(part, n, wide, radius);
        spread = outwards(wide, true);
    }

    // Of some slots those that lie nearer to the second of two means than to the first: ops/summarize.h.
    uint16_t second_part(uint16_t slots) {
        if (std::popcount(slots) < 2) return 0;
        float from_first[kSlots], from_second[kSlots];
        find_mean(slots, std::popcount(slots));
        kernels_.distances(keys_, mean_, p_.head_dim, from_first);
        take_key(farthest(from_first, slots), mean_);
        kernels_.distances(keys_, mean_, p_.head_dim, from_first);
        take_key(farthest(from_first, slots), mean_);
        uint16_t second = 0;
        for (int round = 0;; ++round) {
            kernels_.distances(keys_, mean_, p_.head_dim, from_second);
            uint16_t nearer = 0;
            for (int slot = 0; slot < kSlots; ++slot) {
                nearer |= static_cast<uint16_t>((from_second[slot] < from_first[slot]) << slot);
            }
            nearer &= slots;
            if (nearer == 0 || nearer == slots || nearer == second) break;
            second = nearer;
            if (round == ops::kSplitRounds) break;
            const uint16_t first = slots & ~second;
            find_mean(first, std::popcount(first));
            kernels_.distances(keys_, mean_, p_.head_dim, from_first);
            find_mean(second, std::popcount(second));
        }
        return second & slots & -slots ? static_cast<uint16_t>(slots & ~second) : second;
    }

    static int farthest(const float* squares, uint16_t slots) {
        int best = std::countr_zero(slots);
        for (uint16_t m = slots; m; m &= m - 1) {
            const int slot = std::countr_zero(m);
            if (squares[slot] > squares[best]) best = slot;
        }
        return best;
    }

    void take_key(int slot, float* x) const {
        for (int d = 0; d < p_.head_dim; ++d) x[d] = keys_[d * kSlots + slot];
    }

    void write_values(const ops::SummaryItem& item, bool seen) {
        const int dim = p_.head_dim;
        uint8_t* const codes = item.block + values_offset(dim) + static_cast<int64_t>(item.lane) * dim;
        float& scale = reinterpret_cast<float*>(item.block + value_scales_offset(dim))[item.lane];
        reinterpret_cast<uint32_t*>(item.block + value_slots_offset(dim))[item.lane] = seen ? item.visible : 0;
        std::fill_n(mean_, dim, 0.0f);
        if (seen) {
            const Format format = format_of(item);
            const unsigned char* const page = page_at(p_.pools, item.page);
            kernels_.sum_values[static_cast<int>(format)](
                page + v_offset(format, dim), reinterpret_cast<const uint16_t*>(page + v_scales_offset(format, dim)),
                dim, full_ ? dim : group_size(format, dim), item.visible, mean_);
            kernels_.divide(mean_, static_cast<float>(std::popcount(item.visible)), dim);
            if (full_) kernels_.rotate(mean_, dim, false);
        }
        scale = encode_mean(mean_, dim, 127.0f, false, [codes](int d, int c) { codes[d] = byte_of(c); });
    }

    // Of the keys as the model has them: those of quantized pages are turned back.
    void write_bounds(const ops::SummaryItem& item, bool seen) {
        const int dim = p_.head_dim;
        uint16_t* const lo = reinterpret_cast<uint16_t*>(item.block) + item.lane;  // every 16th
        uint16_t* const hi = reinterpret_cast<uint16_t*>(item.block + upper_offset(dim)) + item.lane;
        bool finite = true;
        if (seen) {
            widen(item, false);
            kernels_.turn_keys(keys_, dim, sums_);
            std::fill_n(least_, dim, std::numeric_limits<float>::infinity());
            std::fill_n(mean_, dim, -std::numeric_limits<float>::infinity());
            for (uint16_t m = item.visible; m; m &= m - 1) {
                float* const key = sums_ + std::countr_zero(m) * dim;
                if (!full_) kernels_.rotate(key, dim, true);
                if (!full_ && item.centre) kernels_.axpy(key, item.centre, 1.0f, dim);
                finite &= kernels_.stretch(least_, mean_, key, dim);
            }
        }
        for (int d = 0; d < dim; ++d) {
            lo[d * kSlots] = !finite ? kNanBf16 : seen ? outwards(least_[d], false) : 0;
            hi[d * kSlots] = !finite ? kNanBf16 : seen ? outwards(mean_[d], true) : 0;
        }
    }

    // The page's keys, those of quantized pages in the rotated domain.
    void widen(const ops::SummaryItem& item, bool centred) {
        const Format format = format_of(item);
        const unsigned char* const page = page_at(p_.pools, item.page);
        if (centred && item.centre != turned_) {  // pages of a row follow each other
            std::copy_n(item.centre, p_.head_dim, centre_);
            kernels_.rotate(centre_, p_.head_dim, false);
            turned_ = item.centre;
        }
        const uint16_t* const scales =
            full_ ? nullptr : reinterpret_cast<const uint16_t*>(page + k_scales_offset(format, p_.head_dim));
        float squares[kSlots];
        kernels_.widen_keys[static_cast<int>(format)](page, scales, p_.head_dim,
                                                      full_ ? 0 : group_size(format, p_.head_dim),
                                                      centred ? centre_ : nullptr, keys_, squares);
    }

    // The mean of some keys, in their domain.
    void find_mean(uint16_t visible, int n) {
        float ones[kSlots];
        std::fill_n(ones, kSlots, 1.0f);
        std::fill_n(sums_, static_cast<int64_t>(p_.head_dim) * kSlots, 0.0f);
        kernels_.sum_keys(keys_, ones, visible, p_.head_dim, sums_);
        kernels_.fold_keys(sums_, p_.head_dim, mean_);
        kernels_.divide(mean_, static_cast<float>(n), p_.head_dim);
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
    bool full_ = true;               // the page at hand
    alignas(64) float keys_[kMaxHeadDim * kSlots];
    alignas(64) float sums_[kMaxHeadDim * kSlots];
    alignas(64) float mean_[kMaxHeadDim];  // or the largest, of bounds
    alignas(64) float least_[kMaxHeadDim];
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
