// What both clusterings share: the live keys of a row less their mean, with which they begin, and how rows are spread over
// threads.
#pragma once

#include <algorithm>

#include "common/layout.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/places.h"
#include "ops/cluster.h"

namespace kvstrata::cpu {

int64_t longest_row(const ops::ClusterParams& params);

// The row's live tokens [n], all of whose page_of become -1, and how many pages they take. Returns n.
int find_live(ops::ClusterRow& row, int32_t* tokens);

// y [n, padded dim]: keys of these tokens less their mean, 0 beyond dim. mean [padded dim] is scratch.
void centre_keys(const Kernels& kernels, const ops::ClusterRow& row, const int32_t* tokens, int n, int dim, float* y,
                 float* mean);

// Clustering(params, row, room).run() clusters one row; Clustering::Room(tokens, padded dim, memory) is what it works in.
template <class Clustering>
int64_t workspace_bytes(const ops::ClusterParams& p) {
    const int workers = std::max(1, std::min(p.threads, p.n_rows));
    return typename Clustering::Room(longest_row(p), padded_dim(p.head_dim), nullptr).bytes * workers;
}

template <class Clustering>
void cluster_rows(const ops::ClusterParams& p) {
    using Room = typename Clustering::Room;
    const int64_t most = longest_row(p), dim = padded_dim(p.head_dim), bytes = Room(most, dim, nullptr).bytes;
    parallel(p.n_rows, p.threads, [&](int64_t r, int worker) {
        const Room room(most, dim, part_of(p.workspace, bytes, worker));
        Clustering(p, p.rows[r], room).run();
    });
}

}  // namespace kvstrata::cpu
