#include "ops/append.h"

#include <cstring>

#include "common/layout.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kSegment = 128;     // tokens per unit of work, at least
constexpr int64_t kAlone = 1024;  // tokens in all up to which the caller works alone

// One token's K and V in the page's format, padded with zeros to whole lines; the caller's own memory if that fits as
// is.
struct Source {
    const void* k;
    const void* v;
};

class Writer {
  public:
    Writer(const ops::AppendParams& params, const ops::AppendRow& row)
        : p_(params), row_(row), kernels_(kernels()), padded_(padded_dim(params.head_dim)) {}

    void write(int first, int end) {
        for (int t = first; t < end;) {
            if (row_.pages[t] < 0) {
                ++t;
            } else if (whole_page(t, end)) {
                put_page(t);
                t += kSlots;
            } else {
                put_slot(t++);
            }
        }
    }

  private:
    bool whole_page(int t, int end) const {
        if (end - t < kSlots || row_.slots[t] != 0) return false;
        for (int i = 1; i < kSlots; ++i) {
            if (row_.pages[t + i] != row_.pages[t] || row_.slots[t + i] != i) return false;
        }
        return true;
    }

    unsigned char* page(int t) const { return const_cast<unsigned char*>(page_at(p_.pools, row_.pages[t])); }
    Format format(int t) const { return p_.pools[page_pool(row_.pages[t])].format; }

    void set_position(int t) {
        const PageId id = row_.pages[t];
        int32_t* const* slabs = p_.pools[page_pool(id)].positions;
        if (slabs)
            slabs[page_slab(id)][page_index(id) * kSlots + row_.slots[t]] =
                row_.positions ? row_.positions[t] : row_.position + t;
    }

    const void* element(const void* base, int64_t stride, int t, Format to, unsigned char* staging) const {
        const int64_t index = row_.tokens ? row_.tokens[t] : t;
        const void* from = static_cast<const char*>(base) + index * stride * dtype_bytes(p_.dtype);
        const DType type = static_cast<DType>(to);  // the full formats have the values of their types
        if (p_.dtype == type && padded_ == p_.head_dim) return from;
        const size_t used = static_cast<size_t>(p_.head_dim) * format_bytes(to);
        kernels_.convert(staging, type, from, p_.dtype, p_.head_dim);
        std::memset(staging + used, 0, static_cast<size_t>(padded_) * format_bytes(to) - used);
        return staging;
    }

    void put_slot(int t) {
        const Format to = format(t);
        const void* k = element(row_.k, row_.k_stride, t, to, staging_[0][0]);
        const void* v = element(row_.v, row_.v_stride, t, to, staging_[1][0]);
        kernels_.put_slot(page(t), format_bytes(to), row_.slots[t], k, v, padded_);
        set_position(t);
    }

    void put_page(int t) {
        const Format to = format(t);
        const void *k[kSlots], *v[kSlots];
        for (int i = 0; i < kSlots; ++i) {
            k[i] = element(row_.k, row_.k_stride, t + i, to, staging_[0][i]);
            v[i] = element(row_.v, row_.v_stride, t + i, to, staging_[1][i]);
            set_position(t + i);
        }
        kernels_.put_page(page(t), format_bytes(to), k, v, padded_);
    }

    const ops::AppendParams& p_;
    const ops::AppendRow& row_;
    const Kernels& kernels_;
    const int padded_;
    alignas(64) unsigned char staging_[2][kSlots][kMaxHeadDim * 4];
};

// First token of a row's segment: a segment begins where a page does, because two slots of a page share words.
int segment_start(const ops::AppendRow& row, int wanted) {
    if (wanted <= 0) return 0;
    int before = wanted - 1;
    while (before > 0 && row.pages[before] < 0) --before;
    int t = wanted;
    while (t < row.count && (row.pages[t] < 0 || row.pages[t] == row.pages[before])) ++t;
    return t < row.count ? t : row.count;
}

}  // namespace

void append(const ops::AppendParams& p) {
    int64_t tokens = 0;
    int most = 0;
    for (int r = 0; r < p.n_rows; ++r) {
        tokens += p.rows[r].count;
        most = most < p.rows[r].count ? p.rows[r].count : most;
    }
    const int64_t segments = (most + kSegment - 1) / kSegment;
    parallel(p.n_rows * segments, tokens <= kAlone ? 1 : p.threads, [&](int64_t unit, int) {
        const ops::AppendRow& row = p.rows[unit / segments];
        const int wanted = static_cast<int>(unit % segments) * kSegment;
        if (wanted >= row.count) return;
        const int end = row.count - wanted > kSegment ? segment_start(row, wanted + kSegment) : row.count;
        const int first = segment_start(row, wanted);
        if (first < end) Writer(p, row).write(first, end);
    });
}

}  // namespace kvstrata::cpu
