// attend for many query rows of 64 or 128 dims.
#include "cuda/attend_launch.cuh"

namespace kvstrata::cuda {

int launch_team_64(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    return launch_pages<Shape<64, true, true, 4, 4, 2>>(args, most_rows, chunks, stream);
}

int launch_team_128(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    return launch_pages<Shape<128, true, true, 4, 4, 2>>(args, most_rows, chunks, stream);
}

}  // namespace kvstrata::cuda
