// Pages of sets on their way Near, for a layer of a sequence.
//
// A delivery holds what it names until it has landed or is given up, whatever becomes of the tables meanwhile: the Near pages that
// bytes come into are taken, and the Far pages that they come from stand.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/types.h"
#include "pages/set.h"
#include "store/copier.h"

namespace kvstrata::store {

struct Fetch {
    Ticket ticket;
    PageId far, near;
    pages::SetTag set;
};

// The pages that one layer of a sequence misses.
struct Delivery {
    int64_t seq;
    int layer;
    std::vector<Fetch> fetches;  // rising Far pages
};

std::string of_set(const char* error, pages::SetTag set);  // what failed, and for which set

}  // namespace kvstrata::store
