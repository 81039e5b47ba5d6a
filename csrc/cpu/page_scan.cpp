#include "cpu/page_scan.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "common/check.h"
#include "common/layout.h"
#include "cpu/merge.h"

namespace kvstrata::cpu {
namespace {

// The log of how many slots a mask has.
constexpr float kLogCount[kSlots + 1] = {kMinusInf,   0.0f,        0.693147182f, 1.09861231f, 1.38629436f, 1.60943794f,
                                         1.79175949f, 1.9459101f,  2.07944155f,  2.19722462f, 2.30258512f, 2.39789534f,
                                         2.48490667f, 2.56494927f, 2.6390574f,   2.70805025f, 2.77258873f};

constexpr int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

int64_t PageScan::bytes(int64_t group, int64_t head_dim) {
    const int64_t head = group * head_dim;
    return 2 * lines(4 * head) + lines(2 * head) + lines(head);
}

PageScan::PageScan(const Settings& settings, unsigned char* room) : s_(settings) {
    const int64_t head = static_cast<int64_t>(s_.group) * s_.head_dim;
    q_ = reinterpret_cast<float*>(room);
    up_ = reinterpret_cast<float*>(room + lines(4 * head));
    pairs_ = reinterpret_cast<int16_t*>(room + 2 * lines(4 * head));
    codes_ = reinterpret_cast<int8_t*>(room + 2 * lines(4 * head) + lines(2 * head));
    query_ = {codes_, pairs_, shift_, curvature_, up_, q_, factor_, s_.group, s_.head_dim, s_.softcap};
    std::fill_n(most_, s_.group * kSlots, kMinusInf);
}

void PageScan::encode(const void* q, int64_t stride) {
    const int dim = s_.head_dim;
    for (int g = 0; g < s_.group; ++g) {
        float* const x = q_ + static_cast<int64_t>(g) * dim;
        const auto* const from = static_cast<const unsigned char*>(q) + g * stride * dtype_bytes(s_.q_dtype);
        kernels_.convert(x, DType::f32, from, s_.q_dtype, dim);
        const float square = kernels_.dot_product(x, x, dim);
        if (s_.kind != SummaryKind::bounds) {
            encode_means(g, square);
            continue;
        }
        factor_[g] = s_.scale + (square - square);
        float* const up = up_ + static_cast<int64_t>(g) * dim;
        for (int d = 0; d < dim; ++d) {
            up[d] = x[d] > 0.0f ? x[d] : 0.0f;
            x[d] = x[d] > 0.0f ? 0.0f : x[d];
        }
    }
}

// R q of a head as codes, and what its logits are multiplied by.
void PageScan::encode_means(int g, float square) {
    const int dim = s_.head_dim;
    float* const q = q_ + static_cast<int64_t>(g) * dim;
    kernels_.rotate(q, dim, false);
    float most = 0.0f;
    for (int d = 0; d < dim; ++d) most = std::max(most, std::abs(q[d]));
    const float delta = most / 127.0f, by = delta > 0.0f ? 1.0f / delta : 0.0f;
    int8_t* const codes = codes_ + static_cast<int64_t>(g) * dim;
    int16_t* const pairs = pairs_ + static_cast<int64_t>(g) * dim;
    constexpr int kOrder[4] = {0, 2, 1, 3};
    int32_t sum = 0;
    for (int d = 0; d < dim; ++d) {
        codes[d] = static_cast<int8_t>(std::clamp(std::nearbyint(q[d] * by), -127.0f, 127.0f));
        sum += codes[d];
    }
    for (int d = 0; d < dim; ++d) pairs[d] = codes[d / 4 * 4 + kOrder[d % 4]];
    shift_[g] = (is_split(s_.kind) ? kZeroNibble : kZeroCode) * sum;
    factor_[g] = s_.scale * delta + (square - square);  // NaN and Inf of the query show
    curvature_[g] = 0.5f * s_.weight * s_.scale * s_.scale * square;
}

uint16_t PageScan::score(const unsigned char* block, const unsigned char* ahead, const uint16_t* masks, float* x,
                         int64_t stride) {
    count(masks);
    if (is_split(s_.kind)) {
        return kernels_.score_split[pairs_of(s_.kind) - 1](query_, block, ahead, masks, x, stride, most_);
    }
    return kernels_.score_block[static_cast<int>(s_.kind)](query_, block, ahead, log_count_, x, stride, most_);
}

uint16_t PageScan::score_groups(const unsigned char* block, const unsigned char* ahead, const int32_t* counts, float* x,
                                int64_t stride) const {
    constexpr float kFlat[ops::kMaxGroup] = {};
    PageQuery flat = query_;
    flat.curvature = kFlat;
    alignas(64) float log_count[kSlots], most[ops::kMaxGroup * kSlots];
    std::fill_n(most, s_.group * kSlots, kMinusInf);
    for (int i = 0; i < kSlots; ++i) {
        if (i > 0 && counts[i] == counts[i - 1]) {
            log_count[i] = log_count[i - 1];
        } else {
            log_count[i] = counts[i] > 0 ? std::log(static_cast<float>(counts[i])) : kMinusInf;
        }
    }
    return kernels_.score_block[static_cast<int>(SummaryKind::mean)](flat, block, ahead, log_count, x, stride, most);
}

void PageScan::count(const uint16_t* masks) {
    uint64_t words[4];
    std::memcpy(words, masks, sizeof words);
    if ((words[0] & words[1] & words[2] & words[3]) == ~uint64_t{0}) {  // most blocks are whole
        if (whole_) return;
        std::fill_n(log_count_, kSlots, kLogCount[kSlots]);
        there_ = kAllSlots, whole_ = true;
        return;
    }
    there_ = 0, whole_ = false;
    for (int lane = 0; lane < kSlots; ++lane) {
        log_count_[lane] = kLogCount[std::popcount(masks[lane])];
        there_ |= static_cast<uint16_t>((masks[lane] != 0) << lane);
    }
}

void FirstUnranked::note(int64_t row, int entry) {
    if (entry < 0) return;
    const int64_t place = row << 32 | entry;
    int64_t now = place_.load();
    while ((now < 0 || place < now) && !place_.compare_exchange_weak(now, place)) {
    }
}

void FirstUnranked::refuse(const char* op) const {
    const int64_t place = place_.load();
    check(place < 0, op, ": the logits of row ", place >> 32, ", entry ", place & 0xFFFFFFFF,
          " are not finite, expected finite keys and queries");
}

}  // namespace kvstrata::cpu
