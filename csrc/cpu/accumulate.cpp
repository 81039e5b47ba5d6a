#include "ops/accumulate.h"

#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {

constexpr int64_t kScores = 16384;  // of a unit of work

void accumulate(const ops::AccumulateParams& p) {
    parallel((p.n + kScores - 1) / kScores, p.threads, [&](int64_t unit, int) {
        const int64_t first = unit * kScores, end = p.n < first + kScores ? p.n : first + kScores;
        if (p.combine == ops::Combine::sum) {
            for (int64_t i = first; i < end; ++i) p.score[i] = p.decay * p.score[i] + p.mass[i];
        } else {
            for (int64_t i = first; i < end; ++i) {
                const float old = p.decay * p.score[i], now = p.mass[i];
                p.score[i] = now > old || now != now ? now : old;
            }
        }
    });
}

}  // namespace kvstrata::cpu
