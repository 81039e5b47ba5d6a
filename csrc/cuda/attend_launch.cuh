// Launches of attend's walk: which instance reads a batch, and how much shared memory it takes.
#pragma once

#include "cuda/attend_pages.cuh"

namespace kvstrata::cuda {

// Shared memory of an SM of the calling thread's device; of the smallest there is where that cannot be asked.
inline int shared_of_sm() {
    int device = 0, bytes = 0;
    const bool known =
        cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) == cudaSuccess;
    return known ? bytes : 100 * 1024;
}

// Bytes of a walker's ring for pages of the batch's formats: as many of the largest as fit beside the SM's other blocks, and one
// at least. The sums of the walk's end fit, too.
template <class S>
int ring_bytes(const AttendArgs& args) {
    constexpr int kReserved = 1024;  // of a block, by the system
    int page = 0;
    for (int f = 0; f < 6; ++f)
        if (args.formats >> f & 1) page = std::max(page, args.staged[f].bytes);
    const int room = (shared_of_sm() / S::kBlocks - kReserved - shared_bytes<S>(args.head_dim, 0)) / S::kWalkers;
    const int pages = page ? ring_pages(room / page) * page : 0;
    const int sums = (S::kTeam ? 4 * S::kWarps : S::kRows) * padded_dim(args.head_dim) * 4;
    return round_up(std::max(pages, sums), 128);
}

// One launch for a batch: rows of up to `most_rows` query rows, cut into up to `chunks` chunks.
template <class S>
int launch_pages(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream) {
    args.tiles = (most_rows + S::kRows - 1) / S::kRows;
    args.ring_bytes = ring_bytes<S>(args);
    const dim3 grid(static_cast<unsigned>(chunks) * static_cast<unsigned>(args.tiles),
                    static_cast<unsigned>(args.batch.count));
    void (*kernel)(AttendArgs);
    if constexpr (S::kTeam) {
        kernel = attend_team<S>;
    } else {
        kernel = attend_few<S>;
    }
    return launch("attend", kernel, grid, S::kThreads,
                  static_cast<size_t>(shared_bytes<S>(args.head_dim, args.ring_bytes)), stream, args);
}

// Up to four query rows a block, up to eight, or more.
enum class Width { quad, octet, team };

// Up to kFewRows query rows: of a head dim of its own, of any up to 128, of any beyond it.
int launch_64(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);
int launch_128(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);
int launch_256(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);
int launch_few(Width width, AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);
int launch_few_wide(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);
// More of them: likewise, of any up to 256, of any beyond it.
int launch_team_64(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);
int launch_team_128(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);
int launch_team(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);
int launch_team_wide(AttendArgs& args, int most_rows, int chunks, cudaStream_t stream);

}  // namespace kvstrata::cuda
