// The backends of every op. Only dispatch.cpp and dispatch_recall.cpp call them; they have checked the params by then.
#pragma once

#include "ops/list.h"
#include "ops/transfer.h"

#define KV_RUN(op, Params) void op(const ops::Params& params);
#define KV_RUN_ON(op, Params) void op(const ops::Params& params, const Where& where);
#define KV_WORKSPACE(op, Params) int64_t op##_workspace_bytes(const ops::Params& params);

namespace kvstrata::cpu {

KV_OPS(KV_RUN)
KV_OPS_IN_WORKSPACE(KV_WORKSPACE)

}  // namespace kvstrata::cpu

// csrc/cuda/library.cpp. Unsupported for what the CUDA library lacks, MachineError where none is open.
namespace kvstrata::cuda {

void upload(std::span<const ops::Piece> pieces, const Where& where);
void copy(const ops::Block& block, const Where& where);
void download(void* to, const void* from, int64_t bytes, const Where& where);
KV_OPS(KV_RUN_ON)
KV_OPS_IN_WORKSPACE(KV_WORKSPACE)

}  // namespace kvstrata::cuda

#undef KV_RUN
#undef KV_RUN_ON
#undef KV_WORKSPACE
