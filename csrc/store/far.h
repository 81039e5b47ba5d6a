// The Far tier's bytes: pages of one Far pool in slabs of files. A page goes out and comes back whole, with its checksum.
//
// Files are read and written at positions, never mapped: a file that was cut short, a full disk or a bad block is an error
// with its call and place, not a signal.
#pragma once

#include <cstdint>
#include <vector>

#include "common/types.h"

namespace kvstrata::store {

class FarSlabs {
  public:
    explicit FarSlabs(int64_t page_bytes) : page_bytes_(page_bytes) {}

    void lend(int slab, int file, int64_t offset, int n_pages);  // space that the file has already
    void give_back(int slab);

    void write(PageId page, const void* from);  // MachineError where that fails
    void read(PageId page, void* to) const;     // likewise, and where the bytes are not those that were written
    int64_t metadata_bytes() const;

  private:
    struct Slab {
        int file = -1;
        int64_t offset = 0;
        std::vector<uint64_t> sums;  // [pages]
    };
    int64_t place(PageId page) const;

    int64_t page_bytes_;
    std::vector<Slab> slabs_;
};

}  // namespace kvstrata::store
