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

    // The sum of the unit's directions k / |k| in each domain.
    void add_up() {
        std::fill_n(sums_, kDomains * w_.stride * kSlots, 0.0f);
        for (int64_t e = begin_; e < end_; ++e) {
            if (!read(e)) continue;
            float weight[kSlots];
            for (int i = 0; i < kSlots; ++i) weight[i] = size_[i] == 0.0f ? 0.0f : 1.0f / size_[i];
            kernels_.sum_keys(keys_, weight, slots_, p_.head_dim, sums_ + domain_ * w_.stride * kSlots);
        }
        float* const part = w_.part(r_, unit_);
        for (int64_t i = 0; i < static_cast<int64_t>(kDomains) * w_.stride; ++i) {
            float total = 0.0f;
            for (int lane = 0; lane < kSlots; ++lane) total += sums_[i * kSlots + lane];
            part[i] = total;
        }
    }

    void score() {
        for (int64_t e = begin_; e < end_; ++e) {
            float* const out = row_.score + e * kSlots;
            float dots[kSlots];
            std::fill_n(out, kSlots, 0.0f);
            if (!read(e)) continue;
            const bool norm = p_.kind == ops::KeyScore::norm;
            if (!norm) kernels_.dot_keys(keys_, w_.anchor(r_) + domain_ * w_.stride, p_.head_dim, dots);
            for (int i = 0; i < kSlots; ++i) {
                if (slots_ >> i & 1) out[i] = norm ? -size_[i] : size_[i] == 0.0f ? 0.0f : -dots[i] / size_[i];
            }
        }
    }

  private:
    // The keys and sizes of an entry's visible slots; false if there is none.
    bool read(int64_t entry) {
        const PageId id = row_.pages[entry];
        slots_ = id < 0 ? uint16_t{0} : row_.visible ? row_.visible[entry] : kAllSlots;
        if (!slots_) return false;
        const Format format = p_.pools[page_pool(id)].format;
        const unsigned char* const page = page_at(p_.pools, id);
        const bool full = is_full(format);
        domain_ = full ? plain : rotated;
        const void* const scales = full ? nullptr : page + k_scales_offset(format, p_.head_dim);
        kernels_.widen_keys[static_cast<int>(format)](page, static_cast<const uint16_t*>(scales), p_.head_dim,
                                                      full ? 0 : group_size(format, p_.head_dim),
                                                      row_.centre ? centre_ : nullptr, keys_);
        kernels_.square_keys(keys_, p_.head_dim, size_);
        for (float& size : size_) size = std::sqrt(size);
        return true;
    }

    const ops::ScoreKeysParams& p_;
    const Workspace& w_;
    const Kernels& kernels_;
    const int64_t r_, unit_;
    const ops::KeysRow& row_;
    const int64_t begin_, end_;
    float *const keys_, *const sums_, *const centre_;
    Domain domain_ = plain;
    uint16_t slots_ = 0;
    float size_[kSlots];
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
    if (p.kind == ops::KeyScore::diversity) {
        each_unit([](KeysUnit& unit) { unit.add_up(); });
        parallel(p.n_rows, threads, [&](int64_t r, int) { find_anchor(p, w, k, r); });
    }
    each_unit([](KeysUnit& unit) { unit.score(); });
}

}  // namespace kvstrata::cpu
