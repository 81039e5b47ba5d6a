// attend for many query rows of any head dim up to 256.
#include "cuda/attend_launch.cuh"

namespace kvstrata::cuda {

int launch_team(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    return launch_pages<Shape<256, false, true, 2, 8, 1>>(args, most_rows, chunks, stream);
}

}  // namespace kvstrata::cuda
