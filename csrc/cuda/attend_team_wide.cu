// attend for many query rows of any head dim beyond 256.
#include "cuda/attend_launch.cuh"

namespace kvstrata::cuda {

int launch_team_wide(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    return launch_pages<Shape<512, false, true, 1, 8, 1>>(args, most_rows, chunks, stream);
}

}  // namespace kvstrata::cuda
