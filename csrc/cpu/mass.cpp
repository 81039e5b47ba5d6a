#include "ops/mass.h"

#include <limits>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {

constexpr int kMassEntries = 64;  // entries per unit of work: 4 KiB of mass stays in the first-level cache

void mass(const ops::MassParams& p) {
    const Kernels& k = kernels();
    const auto add = p.reduce == ops::Reduce::max ? k.mass_max : k.mass_add;
    const int64_t blocks = (p.entries + kMassEntries - 1) / kMassEntries;
    const int64_t queries = static_cast<int64_t>(p.group) * p.queries;
    parallel(p.rows * blocks, p.threads, [&](int64_t unit, int) {
        const int64_t row = unit / blocks, first = unit % blocks * kMassEntries;
        const int n = static_cast<int>(p.entries - first < kMassEntries ? p.entries - first : kMassEntries);
        float* const out = p.mass + (row * p.entries + first) * kSlots;
        for (int i = 0; i < n * kSlots; ++i) out[i] = 0.0f;
        for (int64_t q = row * queries; q < (row + 1) * queries; ++q) {
            if (p.lse[q] == -std::numeric_limits<float>::infinity()) continue;
            add(out, p.logits + (q * p.entries + first) * kSlots, p.lse[q], n);
        }
        if (p.reduce == ops::Reduce::mean && queries > 0) k.divide(out, static_cast<float>(queries), n * kSlots);
    });
}

}  // namespace kvstrata::cpu
