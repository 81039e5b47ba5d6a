#include "ops/rotate.h"

#include <cstring>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {

constexpr int64_t kRotateRows = 64;  // vectors per unit of work

void rotate(const ops::RotateParams& p) {
    const Kernels& k = kernels();
    const int64_t units = (p.n + kRotateRows - 1) / kRotateRows;
    parallel(units, p.threads, [&](int64_t unit, int) {
        const int64_t end = p.n < (unit + 1) * kRotateRows ? p.n : (unit + 1) * kRotateRows;
        for (int64_t i = unit * kRotateRows; i < end; ++i) {
            float* const out = p.out + i * p.head_dim;
            if (p.out != p.x) std::memcpy(out, p.x + i * p.head_dim, sizeof(float) * p.head_dim);
            k.rotate(out, p.head_dim, p.inverse);
        }
    });
}

}  // namespace kvstrata::cpu
