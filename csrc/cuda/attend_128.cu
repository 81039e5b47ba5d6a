// attend for head dims up to 128.
#include "cuda/attend_pages.cuh"

namespace kvstrata::cuda {

int launch_128(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    switch (width) {
        case Width::quad: return launch_pages<Shape<8, 1, 4, false>>(args, most_rows, chunks, stream);
        case Width::octet: return launch_pages<Shape<8, 2, 4, false>>(args, most_rows, chunks, stream);
        default: return launch_pages<Shape<8, 4, 4, true>>(args, most_rows, chunks, stream);
    }
}

}  // namespace kvstrata::cuda
