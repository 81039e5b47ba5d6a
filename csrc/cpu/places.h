// The workspace of a call, shared out among workers.
#pragma once

#include "common/places.h"

namespace kvstrata::cpu {

// The part of a workspace that a worker has, each of so many bytes.
inline void* part_of(void* workspace, int64_t bytes, int worker) {
    return static_cast<unsigned char*>(workspace) + worker * bytes;
}

}  // namespace kvstrata::cpu
