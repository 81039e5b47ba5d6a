// The Far tier's bytes: pages of one Far pool in slabs of files. A page goes out and comes back whole, with its checksum.
//
// Files are read and written at positions, never mapped: a file that was cut short, a full disk or a bad block is an error
// with its call and place, not a signal.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/types.h"

namespace kvstrata::store {

// A page as a file holds it.
struct FarPage {
    int file = -1;
    int64_t place = 0, bytes = 0;
    uint64_t sum = 0;
    bool in_memory = false;                             // the file is no disk's: reading it never waits
    std::shared_ptr<const std::string> name = nullptr;  // of a file of others
};

void read_page(const FarPage& page,
               void* to);  // MachineError where that fails, or its bytes are not those that were written
bool read_page_at_once(const FarPage& page,
                       void* to);     // likewise; false, and no page, where it would wait for the disk
void hint_page(const FarPage& page);  // that it is read soon: the system may bring it meanwhile

class FarSlabs {
  public:
    explicit FarSlabs(int64_t page_bytes) : page_bytes_(page_bytes) {}

    void lend(int slab, int file, int64_t offset, int n_pages);  // space that the file has already
    // Pages of a file of others, [pages] places behind `offset`, and their checksums: only read.
    void lend_named(int slab, int file, int64_t offset, std::vector<int32_t> places, std::vector<uint64_t> sums,
                    std::string name);
    void give_back(int slab);

    void write(PageId page, const void* from);  // MachineError where that fails
    FarPage at(PageId page) const;
    int64_t metadata_bytes() const;

  private:
    struct Slab {
        int file = -1;
        bool in_memory = false;
        int64_t offset = 0;
        std::vector<uint64_t> sums;        // [pages]
        std::vector<int32_t> places = {};  // [pages], or none: as they are numbered
        std::shared_ptr<const std::string> name = nullptr;
    };

    int64_t page_bytes_;
    std::vector<Slab> slabs_;
};

}  // namespace kvstrata::store
