#include "ops/score_keys.h"

#include <algorithm>
#include <cmath>

#include "common/layout.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kUnitEntries = 32;           // entries of a unit of work
constexpr int kAloneUnits = 2;             // units in all up to which the caller works alone
constexpr int kAhead = 6;                  // entries whose keys are fetched ahead: one page is sooner done than fetched
enum Domain { plain, rotated, kDomains };  // of full pages; of quantized pages

// The workspace: sums of directions [R, U, 2, D'] and anchors [R, 2, D'], U units of the longest row; then of each thread
// keys [D', 16], sums [2, D', 16] and centre [D'].
struct Workspace {
    explicit Workspace(const ops::ScoreKeysParams& p) : stride(padded_dim(p.head_dim)) {
        for (int r = 0; r < p.n_rows; ++r) {
            units = std::max<int64_t>(units, (p.rows[r].entries + kUnitEntries - 1) / kUnitEntries);
        }
        const int64_t rows = p.kind == ops::KeyScore::norm ? 0 : p.n_rows;
        parts = static_cast<float*>(p.workspace);
        anchors = parts + rows * units * kDomains * stride;
        threads = anchors + rows * kDomains * stride;
        bytes = 4 * (rows * (units + 1) * kDomains * stride + thread_floats() * std::max(1, p.threads));
    }
    int64_t thread_floats() const { return static_cast<int64_t>(stride) * ((1 + kDomains) * kSlots + 1); }
    float* part(int64_t row, int64_t unit) const { return parts + (row * units + unit) * kDomains * stride; }
    float* anchor(int64_t row) const { return anchors + row * kDomains * stride; }

    int64_t units = 0, bytes;
    int stride;
    float *parts, *anchors, *threads;
};

// A chunk of a row's entries.
class KeysUnit {
  public:
    KeysUnit(const ops::ScoreKeysParams& params, const Workspace& workspace, const Kernels& kernels, int64_t index,
             int worker)
        : p_(params),
          w_(workspace),
          kernels_(kernels),
          r_(index / workspace.units),
          unit_(index % workspace.units),
          row_(params.rows[r_]),
          begin_(std::min<int64_t>(row_.entries, unit_ * kUnitEntries)),
          end_(std::min<int64_t>(row_.entries, begin_ + kUnitEntries)),
          keys_(workspace.threads + worker * workspace.thread_floats()),
          sums_(keys_ + workspace.stride * kSlots),
          centre_(sums_ + kDomains * workspace.stride * kSlots) {
        if (!row_.centre || !quantizable(p_.head_dim)) return;
        std::copy_n(row_.centre, p_.head_dim, centre_);
        kernels_.rotate(centre_, p_.head_dim, false);
    }

    // The sum of the unit's directions k / |k| in each domain; sizes are left in place of the scores.
    void add_up() {
        std::fill_n(sums_, kDomains * w_.stride * kSlots, 0.0f);
        bool met[kDomains] = {};
        for (int64_t e = begin_; e < end_; ++e) {
            if (!measure(e)) continue;
            float weight[kSlots];
            const float* const size = row_.score + e * kSlots;
            for (int i = 0; i < kSlots; ++i) weight[i] = size[i] == 0.0f ? 0.0f : 1.0f / size[i];
            kernels_.sum_keys(keys_, weight, page_.slots, p_.head_dim, sums_ + page_.domain * w_.stride * kSlots);
            met[page_.domain] = true;
        }
        float* const part = w_.part(r_, unit_);
        std::fill_n(part, kDomains * w_.stride, 0.0f);
        for (int d = 0; d < kDomains; ++d) {
            if (met[d]) kernels_.fold_keys(sums_ + d * w_.stride * kSlots, w_.stride, part + d * w_.stride);
        }
    }

    void score_norms() {
        for (int64_t e = begin_; e < end_; ++e) {
            float* const out = row_.score + e * kSlots;
            if (!measure(e)) continue;
            for (int i = 0; i < kSlots; ++i) out[i] = page_.slots >> i & 1 ? -out[i] : 0.0f;
        }
    }

    // From the sizes that add_up left.
    void score_angles() {
        const float* const anchor = w_.anchor(r_);
        const float moved = row_.centre && quantizable(p_.head_dim)
                                ? kernels_.dot_product(centre_, anchor + w_.stride, p_.head_dim)
                                : 0.0f;  // by the centre
        for (int64_t e = begin_; e < end_; ++e) {
            if (!open(e)) continue;
            float dots[kSlots];
            float* const out = row_.score + e * kSlots;
            kernels_.dot_keys[page_.format](page_.data, page_.scales, p_.head_dim, page_.group,
                                            anchor + page_.domain * w_.stride, dots);
            const float more = page_.domain == rotated ? moved : 0.0f;
            for (int i = 0; i < kSlots; ++i) {
                const bool scored = page_.slots >> i & 1 && out[i] != 0.0f;
                out[i] = scored ? -(dots[i] + more) / out[i] : 0.0f;
            }
        }
    }

  private:
    struct Page {
        const unsigned char* data;
        const uint16_t* scales;
        int format, group;
        Domain domain;
        uint16_t slots;
    };

    uint16_t slots_of(int64_t entry) const {
        if (entry >= end_ || row_.pages[entry] < 0) return 0;
        return row_.visible ? row_.visible[entry] : kAllSlots;
    }

    // The page of an entry; false if none of its slots is visible. A later one is fetched meanwhile.
    bool open(int64_t entry) {
        if (slots_of(entry + kAhead)) prefetch(row_.pages[entry + kAhead]);
        page_.slots = slots_of(entry);
        if (!page_.slots) return false;
        const PageId id = row_.pages[entry];
        const Format format = p_.pools[page_pool(id)].format;
        const bool full = is_full(format);
        page_.data = page_at(p_.pools, id);
        page_.format = static_cast<int>(format);
        page_.group = full ? 0 : group_size(format, p_.head_dim);
        page_.domain = full ? plain : rotated;
        page_.scales =
            full ? nullptr : reinterpret_cast<const uint16_t*>(page_.data + k_scales_offset(format, p_.head_dim));
        return true;
    }

    void prefetch(PageId id) const {
        const Format format = p_.pools[page_pool(id)].format;
        const unsigned char* const page = page_at(p_.pools, id);
        const auto fetch = [&](int64_t from, int64_t bytes) {
            for (int64_t at = from; at < from + bytes; at += 64) __builtin_prefetch(page + at, 0, 2);
        };
        fetch(0, half_bytes(format, p_.head_dim));
        if (!is_full(format)) fetch(k_scales_offset(format, p_.head_dim), scale_bytes(format, p_.head_dim));
    }

    // The keys of an entry's visible slots, and their sizes in place of its scores; zeros and false if there is none.
    bool measure(int64_t entry) {
        float* const sizes = row_.score + entry * kSlots;
        if (!open(entry)) {
            std::fill_n(sizes, kSlots, 0.0f);
            return false;
        }
        kernels_.widen_keys[page_.format](page_.data, page_.scales, p_.head_dim, page_.group,
                                          row_.centre ? centre_ : nullptr, keys_, sizes);
        for (int i = 0; i < kSlots; ++i) sizes[i] = std::sqrt(sizes[i]);
        return true;
    }

    const ops::ScoreKeysParams& p_;
    const Workspace& w_;
    const Kernels& kernels_;
    const int64_t r_, unit_;
    const ops::KeysRow& row_;
    const int64_t begin_, end_;
    float *const keys_, *const sums_, *const centre_;
    Page page_{};
};

// The row's anchor as a vector of length 1 in both domains; 0 if it has none.
void find_anchor(const ops::ScoreKeysParams& p, const Workspace& w, const Kernels& k, int64_t r) {
    float* const anchor = w.anchor(r);
    const int units = (p.rows[r].entries + kUnitEntries - 1) / kUnitEntries;
    std::fill_n(anchor, kDomains * w.stride, 0.0f);
    for (int u = 0; u < units; ++u) k.axpy(anchor, w.part(r, u), 1.0f, kDomains * w.stride);
    if (quantizable(p.head_dim)) {
        float* const turned = anchor + w.stride;
        k.rotate(turned, p.head_dim, true);  // both parts in the plain domain, then the whole in both
        k.axpy(anchor, turned, 1.0f, p.head_dim);
        std::copy_n(anchor, p.head_dim, turned);
        k.rotate(turned, p.head_dim, false);
    }
    double square = 0.0;
    for (int d = 0; d < p.head_dim; ++d) square += static_cast<double>(anchor[d]) * anchor[d];
    if (square != 0.0) k.divide(anchor, static_cast<float>(std::sqrt(square)), kDomains * w.stride);
}

}  // namespace

int64_t score_keys_workspace_bytes(const ops::ScoreKeysParams& p) { return Workspace(p).bytes; }

void score_keys(const ops::ScoreKeysParams& p) {
    const Kernels& k = kernels();
    const Workspace w(p);
    const int threads = p.n_rows * w.units <= kAloneUnits ? 1 : p.threads;
    const auto each_unit = [&](auto work) {
        parallel(p.n_rows * w.units, threads, [&](int64_t index, int worker) {
            KeysUnit unit(p, w, k, index, worker);
            work(unit);
        });
    };
    if (p.kind == ops::KeyScore::norm) return each_unit([](KeysUnit& unit) { unit.score_norms(); });
    each_unit([](KeysUnit& unit) { unit.add_up(); });
    parallel(p.n_rows, threads, [&](int64_t r, int) { find_anchor(p, w, k, r); });
    each_unit([](KeysUnit& unit) { unit.score_angles(); });
}

}  // namespace kvstrata::cpu
