// What both clusterings begin with: the live keys of a row less their mean.
#pragma once

#include "cpu/isa.h"
#include "ops/cluster.h"

namespace kvstrata::cpu {

int64_t longest_row(const ops::ClusterParams& params);

// The row's live tokens [n], all of whose page_of become -1, and how many pages they take. Returns n.
int find_live(ops::ClusterRow& row, int32_t* tokens);

// y [n, padded dim]: keys of these tokens less their mean, 0 beyond dim. mean [padded dim] is scratch.
void centre_keys(const Kernels& kernels, const ops::ClusterRow& row, const int32_t* tokens, int n, int dim, float* y,
                 float* mean);

}  // namespace kvstrata::cpu
