// Lists of moves as device/runs.cuh cuts them among blocks, for tests/cuda/test_runs.py. Only in the emulated library.
#include "cuda/device/runs.cuh"

#include "cuda/api.h"

namespace kvstrata::cuda {
namespace {

// owner i32 [n]: the block that takes a move; times i32 [n]: how often it is taken.
__global__ void own_moves(const __grid_constant__ MoveList list, int32_t* owner, int32_t* times) {
    __shared__ Run run;
    each_run(list, static_cast<int>(blockIdx.x) * kPart, run, [&] {
        const int slot = static_cast<int>(threadIdx.x);
        if (slot >= kSlots || !(run.slots >> slot & 1)) return;
        owner[run.at[slot]] = static_cast<int32_t>(blockIdx.x);
        ++times[run.at[slot]];
    });
}

}  // namespace
}  // namespace kvstrata::cuda

KVSTRATA_CUDA_API int kvstrata_cuda_selftest_runs(const kvstrata::ops::Move* moves, int n, int32_t* owner,
                                                  int32_t* times) {
    using namespace kvstrata::cuda;
    return launch("own_moves", own_moves, blocks_for(n, kPart), 2 * kWarp, 0, nullptr, MoveList{moves, n}, owner,
                  times);
}
