// attend for few query rows of 256 dims.
#include "cuda/attend_launch.cuh"

namespace kvstrata::cuda {

int launch_256(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    if (width == Width::quad) return launch_pages<Shape<256, true, false, 1, 4, 3>>(args, most_rows, chunks, stream);
    return launch_pages<Shape<256, true, false, 2, 4, 2>>(args, most_rows, chunks, stream);
}

}  // namespace kvstrata::cuda
