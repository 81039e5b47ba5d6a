#include "ops/merge.h"

#include "common/layout.h"
#include "cpu/isa.h"
#include "cpu/merge.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {

constexpr int64_t kMergeRows = 64;  // results per unit of work

void merge(const ops::MergeParams& p) {
    const Kernels& k = kernels();
    const int64_t units = (p.n + kMergeRows - 1) / kMergeRows;
    const int64_t bytes = dtype_bytes(p.out_dtype) * static_cast<int64_t>(p.head_dim);
    parallel(units, p.threads, [&](int64_t unit, int) {
        alignas(64) float acc[kMaxHeadDim];
        const int64_t end = p.n < (unit + 1) * kMergeRows ? p.n : (unit + 1) * kMergeRows;
        for (int64_t i = unit * kMergeRows; i < end; ++i) {
            const auto part = [&](int j) { return Partial{p.outs[j] + i * p.head_dim, p.lses[j][i]}; };
            const float lse = combine(k, p.parts, part, kMinusInf, acc, p.head_dim);
            k.convert(static_cast<char*>(p.out) + i * bytes, p.out_dtype, acc, DType::f32, p.head_dim);
            if (p.lse) p.lse[i] = lse;
        }
    });
}

}  // namespace kvstrata::cpu
