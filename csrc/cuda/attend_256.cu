// attend for head dims up to 256.
#include "cuda/attend_pages.cuh"

namespace kvstrata::cuda {

int launch_256(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    switch (width) {
        case Width::quad: return launch_pages<Shape<16, 1, 4, false>>(args, most_rows, chunks, stream);
        case Width::octet: return launch_pages<Shape<16, 2, 4, false>>(args, most_rows, chunks, stream);
        default: return launch_pages<Shape<16, 2, 8, true>>(args, most_rows, chunks, stream);
    }
}

}  // namespace kvstrata::cuda
