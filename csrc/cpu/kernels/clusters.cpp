// Products of keys with centroids: a tile of keys by a tile of lines of sixteen centroids.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr int kKeys = 2 * kTile, kLines = 2;  // of a tile: its sums stay in registers

template <int Keys, int Lines>
KV_INLINE void dots_tile(const float* y, const float* z, int32_t dim, float* s, int64_t stride) {
    V sums[Keys][Lines];
    for (auto& key : sums) {
        for (V& sum : key) sum = zero();
    }
    for (int d = 0; d < dim; ++d) {
        V line[Lines];
        for (int l = 0; l < Lines; ++l) line[l] = load(z + (static_cast<int64_t>(l) * dim + d) * 16);
        for (int i = 0; i < Keys; ++i) {
            const V key = set1(y[static_cast<int64_t>(i) * dim + d]);
            for (int l = 0; l < Lines; ++l) sums[i][l] = fma(key, line[l], sums[i][l]);
        }
    }
    for (int i = 0; i < Keys; ++i) {
        for (int l = 0; l < Lines; ++l) store(s + i * stride + l * 16, sums[i][l]);
    }
}

template <int Lines>
KV_INLINE void dots_lines(const float* y, int32_t n, const float* z, int32_t dim, float* s, int64_t stride) {
    int i = 0;
    for (; i + kKeys <= n; i += kKeys) {
        dots_tile<kKeys, Lines>(y + static_cast<int64_t>(i) * dim, z, dim, s + i * stride, stride);
    }
    for (; i < n; ++i) dots_tile<1, Lines>(y + static_cast<int64_t>(i) * dim, z, dim, s + i * stride, stride);
}

void cluster_dots(const float* y, int32_t n, const float* z, int32_t lines, int32_t dim, float* s, int64_t stride) {
    int l = 0;
    for (; l + kLines <= lines; l += kLines) {
        dots_lines<kLines>(y, n, z + static_cast<int64_t>(l) * dim * 16, dim, s + l * 16, stride);
    }
    if (l < lines) dots_lines<1>(y, n, z + static_cast<int64_t>(l) * dim * 16, dim, s + l * 16, stride);
}

}  // namespace

void fill_clusters(Kernels* table) { table->cluster_dots = cluster_dots; }

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_clusters(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
