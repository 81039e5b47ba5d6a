#include "store/far.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "common/check.h"
#include "common/checksum.h"
#include "common/fault.h"

namespace kvstrata::store {
namespace {

// All of n bytes at a place of a file, by calls that may each do a part.
template <class Call>
void whole(Call call, const char* name, int64_t n, int64_t place) {
    for (int64_t done = 0; done < n;) {
        const ssize_t part = call(done);
        if (part < 0 && errno == EINTR) continue;
        if (part < 0) {
            throw MachineError(
                message("far tier: ", name, " of ", n, " bytes at ", place, " failed: ", std::strerror(errno)));
        }
        if (part == 0) {
            throw MachineError(message("far tier: ", name, " of ", n, " bytes at ", place, " ended after ", done,
                                       ": the file was cut short"));
        }
        done += part;
    }
}

}  // namespace

void FarSlabs::lend(int slab, int file, int64_t offset, int n_pages) {
    if (static_cast<size_t>(slab) >= slabs_.size()) slabs_.resize(slab + 1);
    slabs_[slab] = {file, offset, std::vector<uint64_t>(n_pages, 0)};
}

void FarSlabs::give_back(int slab) { slabs_[slab] = {}; }

int64_t FarSlabs::place(PageId page) const { return slabs_[page_slab(page)].offset + page_index(page) * page_bytes_; }

void FarSlabs::write(PageId page, const void* from) {
    fault::hit("far.write");
    Slab& slab = slabs_[page_slab(page)];
    const int64_t at = place(page);
    const auto* const bytes = static_cast<const char*>(from);
    whole([&](int64_t done) { return ::pwrite(slab.file, bytes + done, page_bytes_ - done, at + done); }, "pwrite",
          page_bytes_, at);
    slab.sums[page_index(page)] = checksum(from, page_bytes_);
}

void FarSlabs::read(PageId page, void* to) const {
    fault::hit("far.read");
    const Slab& slab = slabs_[page_slab(page)];
    const int64_t at = place(page);
    auto* const bytes = static_cast<char*>(to);
    whole([&](int64_t done) { return ::pread(slab.file, bytes + done, page_bytes_ - done, at + done); }, "pread",
          page_bytes_, at);
    if (checksum(to, page_bytes_) != slab.sums[page_index(page)]) {
        throw MachineError(message("far tier: the ", page_bytes_, " bytes at ", at,
                                   " are not those that were written: the file was changed or is damaged"));
    }
}

int64_t FarSlabs::metadata_bytes() const {
    int64_t bytes = static_cast<int64_t>(slabs_.capacity() * sizeof(Slab));
    for (const Slab& s : slabs_) bytes += static_cast<int64_t>(s.sums.capacity() * sizeof(uint64_t));
    return bytes;
}

}  // namespace kvstrata::store
