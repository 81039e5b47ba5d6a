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

void pack_full(const ops::PackParams& p, int64_t i, unsigned char* page, Format format) {
    const int padded = padded_dim(p.head_dim), width = format_bytes(format);
    const size_t used = static_cast<size_t>(p.head_dim) * width, all = static_cast<size_t>(padded) * width;
    PaddedRows rows;
    for (int slot = 0; slot < kSlots; ++slot) {
        std::memcpy(rows.k[slot], row_of(p, p.k, i, slot, width), used);
        std::memcpy(rows.v[slot], row_of(p, p.v, i, slot, width), used);
        std::memset(static_cast<char*>(rows.k[slot]) + used, 0, all - used);
        std::memset(static_cast<char*>(rows.v[slot]) + used, 0, all - used);
    }
    kernels().put_page(page, width, rows.k, rows.v, padded);
}

void unpack_full(const ops::PackParams& p, int64_t i, const unsigned char* page, Format format) {
    const int width = format_bytes(format);
    const size_t used = static_cast<size_t>(p.head_dim) * width;
    PaddedRows rows;
    kernels().get_page(page, width, rows.k, rows.v, padded_dim(p.head_dim));
    for (int slot = 0; slot < kSlots; ++slot) {
        std::memcpy(row_of(p, p.k, i, slot, width), rows.k[slot], used);
        std::memcpy(row_of(p, p.v, i, slot, width), rows.v[slot], used);
    }
}

// The scales of page i are canonical as they lie in the page.
unsigned char* scales_of(const ops::PackParams& p, int64_t i, Format format) {
    return reinterpret_cast<unsigned char*>(p.scales) + i * 2 * scale_bytes(format, p.head_dim);
}

void pack_codes(const ops::PackParams& p, int64_t i, unsigned char* page, Format format) {
    const int index = static_cast<int>(format) - static_cast<int>(Format::int8);
    kernels().put_codes[index](page, p.head_dim, kAllSlots, row_of(p, p.k, i, 0, 1), row_of(p, p.v, i, 0, 1),
                               p.head_dim);
    std::memcpy(page + k_scales_offset(format, p.head_dim), scales_of(p, i, format),
                static_cast<size_t>(2 * scale_bytes(format, p.head_dim)));
}

void unpack_codes(const ops::PackParams& p, int64_t i, const unsigned char* page, Format format) {
    const int index = static_cast<int>(format) - static_cast<int>(Format::int8);
    for (int slot = 0; slot < kSlots; ++slot) {
        kernels().get_codes[index](page, slot, p.head_dim, row_of(p, p.k, i, slot, 1), row_of(p, p.v, i, slot, 1));
    }
    std::memcpy(scales_of(p, i, format), page + k_scales_offset(format, p.head_dim),
                static_cast<size_t>(2 * scale_bytes(format, p.head_dim)));
}

template <class Work>
void each_page(const ops::PackParams& p, Work work) {
    parallel(p.n_pages, p.threads, [&](int64_t i, int) {
        const PageId id = p.pages[i];
        work(i, const_cast<unsigned char*>(page_at(p.pools, id)), p.pools[page_pool(id)].format);
    });
}

}  // namespace

void pack(const ops::PackParams& p) {
    each_page(p, [&](int64_t i, unsigned char* page, Format format) {
        is_full(format) ? pack_full(p, i, page, format) : pack_codes(p, i, page, format);
    });
}

void unpack(const ops::PackParams& p) {
    each_page(p, [&](int64_t i, const unsigned char* page, Format format) {
        is_full(format) ? unpack_full(p, i, page, format) : unpack_codes(p, i, page, format);
    });
}

}  // namespace kvstrata::cpu
