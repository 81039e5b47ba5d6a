// Query heads of one row against blocks of summaries: what score_pages, select and estimate share.
#pragma once

#include <atomic>

#include "cpu/isa.h"
#include "ops/supported.h"

namespace kvstrata::cpu {

class PageScan {
  public:
    struct Settings {
        int32_t group, head_dim;
        DType q_dtype;
        SummaryKind kind;
        float scale, weight, softcap;
    };

    static int64_t bytes(int64_t group, int64_t head_dim);  // of `room`, 64-byte aligned
    PageScan(const Settings& settings, unsigned char* room);
    PageScan(const PageScan&) = delete;  // it points into itself

    // The query heads, `stride` elements apart.
    void encode(const void* q, int64_t stride);

    // x[g * stride + lane] of a block whose lanes have these visible slots [16]; `ahead` is a block to prefetch meanwhile.
    // Returns the lanes with a visible slot that cannot be ranked: x of some head is not finite.
    uint16_t score(const unsigned char* block, const unsigned char* ahead, const uint16_t* masks, float* x,
                   int64_t stride);
    // Likewise of a block of sixteen groups of kind mean that have so many visible slots [16], by their means alone. No part of
    // `largest` and `there`. Only after encode() for a kind of means.
    uint16_t score_groups(const unsigned char* block, const unsigned char* ahead, const int32_t* counts, float* x,
                          int64_t stride) const;
    uint16_t there() const { return there_; }  // lanes of the block just scored that have a visible slot
    float largest(int g) const { return kernels_.largest(most_ + g * kSlots, kSlots); }  // x of all so far; -inf: none

  private:
    void encode_means(int g, float square);
    void count(const uint16_t* masks);

    const Settings s_;
    const Kernels& kernels_ = kernels();
    float *q_, *up_;  // [G, D] f32
    int16_t* pairs_;
    int8_t* codes_;
    uint16_t there_ = 0;
    bool whole_ = false;  // log_count_ is of a block without a hidden slot
    PageQuery query_;
    int32_t shift_[ops::kMaxGroup];
    float factor_[ops::kMaxGroup], curvature_[ops::kMaxGroup];
    alignas(64) float log_count_[kSlots];
    alignas(64) float most_[ops::kMaxGroup * kSlots];
};

// The first row, and its entry, that cannot be ranked.
class FirstUnranked {
  public:
    void note(int64_t row, int entry);  // -1: every entry can
    void refuse(const char* op) const;  // throws if one was noted

  private:
    std::atomic<int64_t> place_{-1};  // row * 2^32 + entry
};

}  // namespace kvstrata::cpu
