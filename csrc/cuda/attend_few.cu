// attend for few query rows of any head dim up to 128.
#include "cuda/attend_launch.cuh"

namespace kvstrata::cuda {

int launch_few(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    if (width == Width::quad) return launch_pages<Shape<128, false, false, 1, 4, 4>>(args, most_rows, chunks, stream);
    return launch_pages<Shape<128, false, false, 2, 4, 3>>(args, most_rows, chunks, stream);
}

}  // namespace kvstrata::cuda
