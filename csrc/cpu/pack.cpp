#include "ops/pack.h"

#include <cstring>

#include "common/layout.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

// The sixteen rows of one page, padded to whole lines: canonical rows are D elements, a page's rows padded_dim.
struct PaddedRows {
    alignas(64) unsigned char bytes[2][kSlots][kMaxHeadDim * 4];
    void* k[kSlots];
    void* v[kSlots];

    PaddedRows() {
        for (int slot = 0; slot < kSlots; ++slot) {
            k[slot] = bytes[0][slot];
            v[slot] = bytes[1][slot];
        }
    }
};

unsigned char* row_of(const ops::PackParams& p, void* tensor, int64_t page, int slot, int width) {
    return static_cast<unsigned char*>(tensor) + (page * kSlots + slot) * p.head_dim * width;
}

template <class Move>
void each_page(const ops::PackParams& p, Move move) {
    const Kernels& k = kernels();
    parallel(p.n_pages, p.threads, [&](int64_t i, int) {
        const PageId id = p.pages[i];
        move(k, i, const_cast<unsigned char*>(page_at(p.pools, id)), format_bytes(p.pools[page_pool(id)].format));
    });
}

}  // namespace

void pack(const ops::PackParams& p) {
    const int padded = padded_dim(p.head_dim);
    each_page(p, [&](const Kernels& k, int64_t i, unsigned char* page, int width) {
        PaddedRows rows;
        const size_t used = static_cast<size_t>(p.head_dim) * width, all = static_cast<size_t>(padded) * width;
        for (int slot = 0; slot < kSlots; ++slot) {
            std::memcpy(rows.k[slot], row_of(p, p.k, i, slot, width), used);
            std::memcpy(rows.v[slot], row_of(p, p.v, i, slot, width), used);
            std::memset(static_cast<char*>(rows.k[slot]) + used, 0, all - used);
            std::memset(static_cast<char*>(rows.v[slot]) + used, 0, all - used);
        }
        k.put_page(page, width, rows.k, rows.v, padded);
    });
}

void unpack(const ops::PackParams& p) {
    const int padded = padded_dim(p.head_dim);
    each_page(p, [&](const Kernels& k, int64_t i, unsigned char* page, int width) {
        PaddedRows rows;
        const size_t used = static_cast<size_t>(p.head_dim) * width;
        k.get_page(page, width, rows.k, rows.v, padded);
        for (int slot = 0; slot < kSlots; ++slot) {
            std::memcpy(row_of(p, p.k, i, slot, width), rows.k[slot], used);
            std::memcpy(row_of(p, p.v, i, slot, width), rows.v[slot], used);
        }
    });
}

}  // namespace kvstrata::cpu
