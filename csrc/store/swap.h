// Reads of the Far tier that run beside other work: a thread of its own takes deliveries in the order in which they are given.
//
// A delivery owns what it names until its reads have ended: the Near pages that they go to are taken, and the Far pages that they
// come from held, whatever becomes of the tables meanwhile. So a read that ends late lands in no other page's place.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/types.h"
#include "pages/set.h"
#include "store/far.h"

namespace kvstrata::store {

// A page that is on its way.
struct Fetch {
    FarPage from;
    void* payload;  // of `near`
    PageId far, near;
    pages::SetTag set;
};

std::string of_set(const char* error, pages::SetTag set);  // what failed, and for which set

// The pages that one layer of a sequence misses.
struct Delivery {
    int64_t seq;
    int layer;
    std::vector<Fetch> fetches;
    bool late = false;   // nobody waits any more
    std::string error;   // of its reads, once they have ended; empty: none
    bool ended = false;  // the reader's, under its lock
};

inline constexpr double kPatience = 120.0;  // seconds

class Reader {
  public:
    Reader();
    ~Reader();  // ends the thread: what it has not begun is not read
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    void begin(std::shared_ptr<Delivery> delivery);
    bool ended(const Delivery& delivery) const;
    bool wait(Delivery& delivery);  // whether its reads ended, `patience` from now at the latest
    void stop();

    double patience = kPatience;

  private:
    struct Work;
    std::unique_ptr<Work> work_;  // with the first delivery
};

}  // namespace kvstrata::store
