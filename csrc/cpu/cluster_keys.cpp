#include "cpu/cluster_keys.h"

#include <algorithm>

#include "common/layout.h"

namespace kvstrata::cpu {

int64_t longest_row(const ops::ClusterParams& p) {
    int64_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) most = std::max<int64_t>(most, p.rows[r].tokens);
    return most;
}

int find_live(ops::ClusterRow& row, int32_t* tokens) {
    int n = 0;
    for (int i = 0; i < row.tokens; ++i) {
        row.page_of[i] = -1;
        if (!row.live || row.live[i]) tokens[n++] = i;
    }
    row.pages = (n + kSlots - 1) / kSlots;
    return n;
}

void centre_keys(const Kernels& kernels, const ops::ClusterRow& row, const int32_t* tokens, int n, int raw_dim,
                 float* y, float* mean) {
    const int64_t dim = padded_dim(raw_dim);
    std::fill_n(mean, dim, 0.0f);
    for (int i = 0; i < n; ++i) {
        std::fill_n(y + i * dim, dim, 0.0f);
        std::copy_n(row.keys + static_cast<int64_t>(tokens[i]) * raw_dim, raw_dim, y + i * dim);
        kernels.axpy(mean, y + i * dim, 1.0f, static_cast<int32_t>(dim));
    }
    kernels.divide(mean, static_cast<float>(n), static_cast<int32_t>(dim));
    for (int i = 0; i < n; ++i) kernels.axpy(y + i * dim, mean, -1.0f, static_cast<int32_t>(dim));
}

}  // namespace kvstrata::cpu
