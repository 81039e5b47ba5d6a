// What a store knows of one sequence.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "pages/row.h"
#include "store/index.h"
#include "store/queries.h"
#include "store/reading.h"

namespace kvstrata::store {

using SeqId = int64_t;

// What a row's quantized keys are relative to, set when one is first quantized and frozen then.
struct Centre {
    bool frozen = false;
    std::shared_ptr<const std::vector<float>> mean;  // [D], or null: zeros
    const float* on_device = nullptr;                // the same, where ops run elsewhere
};

struct Sequence {
    int64_t length = 0;                            // real tokens seen, always
    int64_t confirmed = 0;                         // while recording: tokens below this are final
    int64_t floor = 0;                             // crop below this is refused: something older was dropped
    std::vector<pages::Row> rows;                  // all layers; layer l, head h at first_row[l] + h
    std::vector<Centre> centres;                   // as rows
    std::vector<QueryRing> rings;                  // [L], if queries are remembered
    std::vector<Index> indices;                    // as rows, if a step selects
    pages::View view;                              // of a store with sets
    std::vector<std::vector<Sought>> sought = {};  // as rows, once a disk had to be waited for
    pages::Owner owner = pages::kCache;  // of the pages that it takes; whoever continues a sequence that ends keeps it
    std::vector<uint32_t> routed = {};   // of each set: when a view last named it
};

}  // namespace kvstrata::store
