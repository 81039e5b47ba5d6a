// attend for few query rows of any head dim beyond 128. Sums of more than four rows have no room in registers.
#include "cuda/attend_launch.cuh"

namespace kvstrata::cuda {

int launch_few_wide(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    if (args.head_dim > 256) return launch_pages<Shape<512, false, false, 1, 2, 4>>(args, most_rows, chunks, stream);
    return launch_pages<Shape<256, false, false, 1, 4, 3>>(args, most_rows, chunks, stream);
}

}  // namespace kvstrata::cuda
