// What kernels of a device read of a store's books: of each row the pages and visible masks of its entries, the addresses of
// slabs, and the lists of one call. It lies in memory of the device that Python lends. On the CPU kernels read the books
// themselves, and nothing here is used.
//
// Lists are queued as pieces and go up together, before the op that reads them. All is in the order of one stream: memory that
// is given up or written anew is still what earlier work needs it to be.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "ops/pool_view.h"
#include "ops/transfer.h"
#include "pages/pool.h"
#include "pages/row.h"

namespace kvstrata::store {

// What lent memory is for. Tables only grow; of the others a new loan takes the place of the one before.
enum class Loan : uint8_t { tables = 0, lists = 1, workspace = 2, pools = 3 };

class Mirror {
  public:
    // Memory of the device, 256-byte aligned; throws where there is none, or a limit forbids it.
    using Lend = std::function<unsigned char*(Loan, int64_t bytes)>;

    Where where;  // of the store's ops; the stream is that of the open call

    bool on() const { return !where.on_host(); }
    void set_lend(Lend lend) { lend_ = std::move(lend); }

    // A row's list as it stands now, where ops read it; queued where it has changed. It has room for `least` entries.
    const PageId* pages(pages::Row& row, int32_t least = 0);
    const uint16_t* visible(const pages::Row& row) const;  // after pages
    void pad(pages::Row& row);                             // after pages: no page in the rest of its room
    void leave(pages::Row& row);                           // it ends: its list serves another

    // The views of all pools for a call; `out` names the host's tables. Those of a pool stay where they are until one has twice as
    // many slabs as it had room for.
    void pools(PoolView* out, size_t n, uint64_t version);

    // Lists of one call, written by it alone: bytes of all of them first, then each, before any row's. What an earlier call
    // has queued and, failing, not sent does not go up: its lists may be gone.
    void begin_lists(int64_t bytes);
    template <class T>
    T* list(std::span<const T> from) {
        return static_cast<T*>(place(from.data(), static_cast<int64_t>(from.size_bytes())));
    }
    unsigned char* space(int64_t bytes) { return static_cast<unsigned char*>(place(nullptr, bytes)); }
    static int64_t list_bytes(int64_t bytes) { return (bytes + 15) / 16 * 16; }
    template <class T>
    static int64_t list_bytes(std::span<const T> list) {
        return list_bytes(static_cast<int64_t>(list.size_bytes()));
    }

    unsigned char* workspace(int64_t bytes);
    void settle_workspace(bool large);  // what decoding needs is kept; what a call of several queries needed is not
    float* constant(std::span<const float> from);          // for good
    std::shared_ptr<unsigned char> shared(int64_t bytes);  // memory where ops run, until its last holder ends
    void put(void* to, const void* from, int64_t bytes) { queue_.push_back({to, from, bytes}); }  // into `shared`
    void flush();  // what is queued goes up

  private:
    void* place(const void* from, int64_t bytes);
    void forget();
    unsigned char* table(int64_t bytes);

    Lend lend_;
    std::vector<ops::Piece> queue_;
    unsigned char* block_ = nullptr;  // the table block in use
    int64_t block_left_ = 0, tables_ = 0;
    std::vector<std::vector<unsigned char*>> spare_;       // [log2 capacity] lists that rows have left
    std::map<int64_t, std::vector<unsigned char*>> idle_;  // by bytes: what `shared` has lent and has back
    unsigned char *lists_ = nullptr, *workspace_ = nullptr, *pools_ = nullptr;
    int64_t lists_size_ = 0, lists_used_ = 0, workspace_size_ = 0, kept_workspace_ = 0;
    std::array<int64_t, kMaxPools> slab_room_{};  // slabs for which `pools_` has room
    uint64_t pools_version_ = 0;
    uint32_t epoch_ = 1;  // lists of an older one have to go up again
};

}  // namespace kvstrata::store
