#include "cpu/group_choice.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>

#include "cpu/merge.h"
#include "ops/summarize_groups.h"

namespace kvstrata::cpu {
namespace {

constexpr int kAhead = 4;  // blocks

class GroupChoice {
  public:
    GroupChoice(const ops::SelectParams& params, const ops::SelectRow& row, const PageScan& scan,
                const GroupPlaces& places)
        : p_(params), row_(row), scan_(scan), w_(places), blocks_((row.groups + kSlots - 1) / kSlots) {}

    int run() {
        score();
        vote();
        mark_best();
        return list_blocks();
    }

  private:
    int padded() const { return blocks_ * kSlots; }
    float* x_of(int g) const { return w_.x + static_cast<int64_t>(g) * padded(); }

    int visible(int group) const {
        constexpr int kWords = ops::kGroupPages / 4;
        const int from = group * ops::kGroupPages;
        uint64_t masks[kWords], all = ~uint64_t{0};
        std::memcpy(masks, row_.visible + from, sizeof masks);
        for (const uint64_t word : masks) all &= word;
        if (from >= row_.first && all == ~uint64_t{0}) return ops::kGroupPages * kSlots;  // most are whole
        int n = 0;
        for (int e = std::max(from, row_.first); e < from + ops::kGroupPages; ++e) n += std::popcount(row_.visible[e]);
        return n;
    }

    // x of all groups. Those that cannot be ranked are chosen: their pages say why.
    void score() {
        for (int b = 0; b < blocks_; ++b) {
            int32_t counts[kSlots];
            uint16_t there = 0;
            for (int lane = 0; lane < kSlots; ++lane) {
                const int group = b * kSlots + lane;
                counts[lane] = group < row_.groups ? visible(group) : 0;
                there |= static_cast<uint16_t>((counts[lane] > 0) << lane);
            }
            const unsigned char* const ahead = row_.group_blocks[std::min(b + kAhead, blocks_ - 1)];
            w_.chosen[b] = scan_.score_groups(row_.group_blocks[b], ahead, counts, w_.x + b * kSlots, padded());
            w_.there[b] = static_cast<uint16_t>(there & ~w_.chosen[b]);
            leave(b, w_.chosen[b]);
        }
    }

    // What is looked into no longer counts as a group.
    void leave(int b, uint32_t lanes) {
        for (; lanes; lanes &= lanes - 1) {
            for (int g = 0; g < p_.group; ++g) x_of(g)[b * kSlots + std::countr_zero(lanes)] = kMinusInf;
        }
    }

    void vote() {
        float share[ops::kMaxGroup];
        std::copy_n(w_.x, static_cast<int64_t>(p_.group) * padded(), w_.shares);
        for (int g = 0; g < p_.group; ++g) {
            float* const e = w_.shares + static_cast<int64_t>(g) * padded();
            const float most = kernels_.largest(e, padded());
            share[g] = 0.0f;
            if (most == kMinusInf) {
                std::fill_n(e, padded(), 0.0f);
                continue;
            }
            const float base = row_.lse_base ? row_.lse_base[g] : kMinusInf;
            const float all = kernels_.exp_sum(e, most, padded()) + std::exp(base - most);
            share[g] = all > 0.0f ? 1.0f / all : 0.0f;
        }
        kernels_.count_votes(w_.shares, padded(), share, p_.group, padded(), p_.aggregate == ops::Aggregate::sum,
                             w_.there, w_.vote);
    }

    void mark_best() {
        int n = 0;
        for (int b = 0; b < blocks_; ++b) {
            for (uint32_t lanes = w_.there[b]; lanes; lanes &= lanes - 1) {
                const int group = b * kSlots + std::countr_zero(lanes);
                w_.keys[n++] = static_cast<uint64_t>(std::bit_cast<uint32_t>(w_.vote[group])) << 32 |
                               ~static_cast<uint32_t>(group);  // of equal votes the lower group
            }
        }
        const int kept = std::min(n, row_.expand);
        if (kept < n) std::nth_element(w_.keys, w_.keys + kept, w_.keys + n, std::greater<>());
        for (int i = 0; i < kept; ++i) {
            const int group = static_cast<int>(~static_cast<uint32_t>(w_.keys[i]));
            const auto lane = static_cast<uint16_t>(1u << group % kSlots);
            w_.chosen[group / kSlots] |= lane;
            leave(group / kSlots, lane);
        }
    }

    // Those of the chosen groups, and what follows the last group.
    int list_blocks() {
        int n = 0;
        for (int b = 0; b < blocks_; ++b) {
            for (uint32_t lanes = w_.chosen[b]; lanes; lanes &= lanes - 1) {
                const int first = (b * kSlots + std::countr_zero(lanes)) * ops::kGroupBlocks;
                for (int i = 0; i < ops::kGroupBlocks; ++i) w_.blocks[n++] = first + i;
            }
        }
        for (int b = row_.groups * ops::kGroupBlocks; b < (row_.entries + kSlots - 1) / kSlots; ++b) w_.blocks[n++] = b;
        return n;
    }

    const ops::SelectParams& p_;
    const ops::SelectRow& row_;
    const PageScan& scan_;
    const GroupPlaces& w_;
    const Kernels& kernels_ = kernels();
    const int blocks_;  // of groups
};

}  // namespace

int GroupPlaces::lanes(int64_t entries) {
    const int64_t groups = entries / ops::kGroupPages;
    return static_cast<int>((groups + kSlots - 1) / kSlots * kSlots);
}

int choose_groups(const ops::SelectParams& params, const ops::SelectRow& row, const PageScan& scan,
                  const GroupPlaces& places) {
    return GroupChoice(params, row, scan, places).run();
}

}  // namespace kvstrata::cpu
