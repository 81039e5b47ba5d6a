#include "store/far.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/magic.h>
#include <sys/vfs.h>
#endif

#include <cerrno>
#include <cstring>
#include <utility>

#include "common/check.h"
#include "common/checksum.h"
#include "common/fault.h"
#include "store/trouble.h"

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

void check_sum(const FarPage& page, const void* read) {
    if (checksum(read, page.bytes) == page.sum) return;
    throw MachineError(message("far tier: ", page.name ? *page.name + ": the " : "the ", page.bytes, " bytes at ",
                               page.place, " are not those that were written: the file was changed or is damaged"));
}

bool lies_in_memory([[maybe_unused]] int file) {
#if defined(__linux__)
    struct statfs found;
    return ::fstatfs(file, &found) == 0 && found.f_type == TMPFS_MAGIC;
#else
    return false;
#endif
}

}  // namespace

void read_page(const FarPage& page, void* to) {
    auto* const bytes = static_cast<char*>(to);
    const std::string call = page.name ? "pread of " + *page.name : "pread";
    whole([&](int64_t done) { return trouble::pread(page.file, bytes + done, page.bytes - done, page.place + done); },
          call.c_str(), page.bytes, page.place);
    check_sum(page, to);
}

bool read_page_at_once(const FarPage& page, void* to) {
    if (trouble::on()) return false;
    if (page.in_memory) return read_page(page, to), true;
#if defined(RWF_NOWAIT)
    const iovec place{to, static_cast<size_t>(page.bytes)};
    const ssize_t n = ::preadv2(page.file, &place, 1, page.place, RWF_NOWAIT);
    if (n == page.bytes) return check_sum(page, to), true;
#endif
    return false;  // what is wrong with it, if anything, whoever reads it after all finds out
}

void hint_page([[maybe_unused]] const FarPage& page) {
#if defined(POSIX_FADV_WILLNEED)
    ::posix_fadvise(page.file, page.place, page.bytes, POSIX_FADV_WILLNEED);
#endif
}

void FarSlabs::lend(int slab, int file, int64_t offset, int n_pages) {
    if (static_cast<size_t>(slab) >= slabs_.size()) slabs_.resize(slab + 1);
    slabs_[slab] = {file, lies_in_memory(file), offset, std::vector<uint64_t>(n_pages, 0)};
}

void FarSlabs::lend_named(int slab, int file, int64_t offset, std::vector<int32_t> places, std::vector<uint64_t> sums,
                          std::string name) {
    if (static_cast<size_t>(slab) >= slabs_.size()) slabs_.resize(slab + 1);
    slabs_[slab] = {file,
                    lies_in_memory(file),
                    offset,
                    std::move(sums),
                    std::move(places),
                    std::make_shared<const std::string>(std::move(name))};
}

void FarSlabs::give_back(int slab) { slabs_[slab] = {}; }

FarPage FarSlabs::at(PageId page) const {
    const Slab& slab = slabs_[page_slab(page)];
    const int index = page_index(page);
    const int64_t place = slab.places.empty() ? index : slab.places[index];
    return {slab.file, slab.offset + place * page_bytes_, page_bytes_, slab.sums[index], slab.in_memory, slab.name};
}

void FarSlabs::write(PageId page, const void* from) {
    fault::hit("far.write");
    const FarPage to = at(page);
    const auto* const bytes = static_cast<const char*>(from);
    whole([&](int64_t done) { return trouble::pwrite(to.file, bytes + done, to.bytes - done, to.place + done); },
          "pwrite", to.bytes, to.place);
    slabs_[page_slab(page)].sums[page_index(page)] = checksum(from, page_bytes_);
}

int64_t FarSlabs::metadata_bytes() const {
    int64_t bytes = static_cast<int64_t>(slabs_.capacity() * sizeof(Slab));
    for (const Slab& s : slabs_) {
        bytes += static_cast<int64_t>(s.sums.capacity() * sizeof(uint64_t) + s.places.capacity() * sizeof(int32_t));
    }
    return bytes;
}

}  // namespace kvstrata::store
