// What the launches of a decoding step name beside the tensors of its calls, so that a CUDA graph may hold them: one token of each
// of some sequences, in all layers.
//
// Rows' lists stay where they are and are as long as their room, with no page behind the last; launch shapes follow from that
// room. Where tokens go, and their positions, are read on the device, from lists that go up before.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/types.h"

namespace kvstrata::store {

struct Layout {
    using Names = std::vector<uintptr_t>;  // addresses and sizes; launches that were captured hold for equal ones alone

    Names names;
    int64_t epoch = 0;                      // raised whenever `names` have changed
    std::shared_ptr<unsigned char> memory;  // the lists, then the workspace
    int64_t bytes = 0;

    // Lists of all rows of all layers: [L][B, H], and of the sequences [B]. In `memory`.
    PageId* pages = nullptr;
    uint8_t* slots = nullptr;
    int32_t *columns = nullptr, *positions = nullptr;
    unsigned char* workspace = nullptr;
};

}  // namespace kvstrata::store
