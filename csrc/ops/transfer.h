// Bytes on their way: between places of one device, and between it and the host. No op: nothing is computed.
//
// On CUDA all but `download` join the stream and return at once. `upload` has read its source by then: the bytes travel with
// launches, so that it is for lists, not for payload.
#pragma once

#include <cstdint>
#include <span>

#include "common/types.h"

namespace kvstrata::ops {

struct Piece {
    void* to;          // where ops run
    const void* from;  // on the host
    int64_t bytes;
};

struct Block {  // `rows` pieces of `bytes` each, so far apart
    void* to;
    int64_t to_stride;  // bytes
    const void* from;
    int64_t from_stride;  // bytes
    int64_t bytes;
    int64_t rows;
};

void upload(std::span<const Piece> pieces, const Where& where);
void copy(const Block& block, const Where& where);                             // both ends where ops run
void download(void* to, const void* from, int64_t bytes, const Where& where);  // waits for it

}  // namespace kvstrata::ops
