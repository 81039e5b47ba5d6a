#include "ops/summarize_groups.h"

#include <bit>

#include "common/layout.h"
#include "cpu/isa.h"
#include "cpu/mean_code.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

void write_group(const ops::GroupItem& item, int dim) {
    const Kernels& k = kernels();
    alignas(64) float sums[kMaxHeadDim];
    float weight[kSlots], total = 0.0f;
    std::fill_n(sums, dim, 0.0f);
    for (int b = 0; b < ops::kGroupBlocks; ++b) {
        const auto* const scale = reinterpret_cast<const float*>(item.from[b] + static_cast<int64_t>(kSlots) * dim);
        for (int lane = 0; lane < kSlots; ++lane) {
            const auto n = static_cast<float>(std::popcount(item.visible[b * kSlots + lane]));
            weight[lane] = n > 0.0f ? n * scale[lane] : 0.0f;  // what is hidden may be of any content
            total += n;
        }
        k.add_means(item.from[b], weight, dim, sums);
    }
    if (total > 0.0f) k.divide(sums, total, dim);
    uint8_t* const codes = item.block + 4 * item.lane;
    float* const facts = reinterpret_cast<float*>(item.block + static_cast<int64_t>(kSlots) * dim) + item.lane;
    facts[0] = encode_mean(sums, dim, 127.0f, false,
                           [codes](int d, int c) { code_of(codes, d) = static_cast<uint8_t>(c + kZeroCode); });
    facts[kSlots] = facts[2 * kSlots] = 0.0f;
}

}  // namespace

void summarize_groups(const ops::SummarizeGroupsParams& p) {
    parallel(p.n_items, p.threads, [&](int64_t i, int) { write_group(p.items[i], p.head_dim); });
}

}  // namespace kvstrata::cpu
