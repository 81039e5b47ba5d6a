// Rows of an op as kernel arguments: host arrays travel by value, in batches of at most 16 KiB, one launch each.
#pragma once

#include "cuda/device/launch.cuh"

namespace kvstrata::cuda {

#if defined(KVSTRATA_EMULATE)
inline constexpr int kBatchBytes = 1024;  // small, so that tests see several batches
#else
inline constexpr int kBatchBytes = 16 * 1024;
#endif

template <class Row>
struct RowBatch {
    static constexpr int kMost = (kBatchBytes - 2 * static_cast<int>(sizeof(int32_t))) / static_cast<int>(sizeof(Row));
    static_assert(kMost > 0);
    Row rows[kMost];
    int32_t count;  // rows of this batch, 1..kMost
    int32_t first;  // index of rows[0] among all rows
};

// launch_batch(batch) for all rows in order, each as row_of makes it, until one returns not 0; that, or 0.
template <class Row, class From, class RowOf, class Launch>
int in_batches_of(const From* rows, int32_t n_rows, RowOf row_of, Launch launch_batch) {
    RowBatch<Row> batch;
    for (batch.first = 0; batch.first < n_rows; batch.first += batch.count) {
        const int32_t left = n_rows - batch.first;
        batch.count = left < RowBatch<Row>::kMost ? left : RowBatch<Row>::kMost;
        for (int32_t i = 0; i < batch.count; ++i) batch.rows[i] = row_of(rows[batch.first + i]);
        if (const int code = launch_batch(static_cast<const RowBatch<Row>&>(batch)); code != 0) return code;
    }
    return 0;
}

// Likewise, of rows as they are.
template <class Row, class Launch>
int in_batches(const Row* rows, int32_t n_rows, Launch launch_batch) {
    return in_batches_of<Row>(rows, n_rows, [](const Row& row) { return row; }, launch_batch);
}

}  // namespace kvstrata::cuda
