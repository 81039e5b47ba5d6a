// chunk_order: the tokens of each row, sorted into chunks of 16 of one kind, and what each chunk is worth.
//
//   order: tokens by rising kind, then by falling value (NaN first), ties the lower position, then the lower index
//   w[m]:  sum of the values of chunk m, f32, in that order; each kind's tokens are cut in 16s, the last may be short
//
// Kind 0 is in no chunk: order is -1 behind a row's last token, w is 0 behind its last chunk.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata::ops {

inline constexpr int kMaxKind = 255;

// The most chunks that a row of so many tokens has: every kind may end in a short one.
constexpr int64_t most_chunks(int64_t tokens) {
    return (tokens + (kSlots - 1) * (tokens < kMaxKind ? tokens : kMaxKind)) / kSlots;
}

struct ChunkOrderRow {
    const float* value;   // [N]
    const uint8_t* kind;  // [N]
    const int32_t* pos;   // [N]
    int32_t* order;       // [N]
    float* w;             // [M]
    int32_t* items;       // [1] how many chunks there are
};

struct ChunkOrderParams {
    const ChunkOrderRow* rows;  // [R]
    int32_t n_rows;
    int32_t tokens;   // N
    int32_t chunks;   // M, at least most_chunks(N)
    void* workspace;  // chunk_order_workspace_bytes(params) bytes, 64-byte aligned
    int32_t threads;
};

int64_t chunk_order_workspace_bytes(const ChunkOrderParams& params, const Where& where = {});
void chunk_order(const ChunkOrderParams& params, const Where& where = {});

}  // namespace kvstrata::ops
