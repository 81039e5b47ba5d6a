// Query rows as quantized pages read them: rotated, and in whole numbers.
#pragma once

#include <algorithm>

#include "common/layout.h"
#include "cpu/kernels.h"

namespace kvstrata::cpu {

// Fills tile.query from tile.q; `centre` [D] is the row's, or null: zeros. D is quantizable.
inline void encode_queries(const Kernels& kernels, const AttendTile& tile, const float* centre) {
    alignas(64) float rotated[kMaxHeadDim];
    const int dim = tile.head_dim;
    for (int row = 0; row < tile.rows; ++row) {
        const float* const q = tile.q + static_cast<int64_t>(row) * tile.stride;
        std::copy_n(q, dim, rotated);
        kernels.rotate(rotated, dim, false);
        int16_t* const codes = tile.query.codes + static_cast<int64_t>(row) * tile.stride;
        tile.query.delta[row] = kernels.encode_query(rotated, dim, codes);
        tile.query.centre[row] = centre ? kernels.dot_product(q, centre, dim) : 0.0f;
    }
}

}  // namespace kvstrata::cpu
