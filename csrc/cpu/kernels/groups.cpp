// Means of groups of pages from the means of the pages (ops/summarize_groups.h).
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "common/layout.h"
#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

// Sixteen bytes of a line are four channels of four pages: their sum over the pages is of lanes four apart.
void add_means(const unsigned char* block, const float* weight, int32_t dim, float* sums) {
    float spread[4][16], lanes[16];
    for (int page = 0; page < kSlots; ++page) {
        for (int c = 0; c < 4; ++c) spread[page / 4][page % 4 * 4 + c] = weight[page];
    }
    for (int d = 0; d < dim; d += 4) {
        V total = zero();
        for (int quad = 0; quad < 4; ++quad) {
            total = fma(load_code(block + d * kSlots + quad * 16), load(spread[quad]), total);
        }
        store(lanes, total);
        for (int c = 0; c < 4; ++c) sums[d + c] += (lanes[c] + lanes[4 + c]) + (lanes[8 + c] + lanes[12 + c]);
    }
}

}  // namespace

void fill_groups(Kernels* table) { table->add_means = add_means; }

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_groups(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
