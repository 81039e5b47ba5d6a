#include "ops/score_max.h"

#include <algorithm>

#include "common/layout.h"
#include "cpu/merge.h"
#include "cpu/parallel.h"
#include "cpu/window_block.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kMostEntries = 64;  // entries of a unit: their keys stay in the cache while the queries pass
constexpr int kLeastEntries = 8;  // fewer are no work beside the queries' conversion
constexpr int kUnitsPerThread = 4;
constexpr int kAloneVisits = 16;  // pages under blocks of queries in all, up to which the caller works alone

struct Segment {  // rows of a block that belong to one span
    int begin, end, span;
};

struct MaxScratch {  // of one thread
    BlockScratch block;
    float *z, *lse;     // [B, 16], [B]
    uint16_t* asked;    // [B] all slots; none for a query that saw nothing
    Segment* segments;  // [B]
    int32_t* entries;   // [kMostEntries] that have a visible slot
    uint16_t* slots;    // [kMostEntries] which ones

    int64_t lay_out(unsigned char* base, int64_t dim) {
        Pieces pieces{base};
        block.lay_out(pieces, kTileRows, dim);
        pieces.take(z, 4 * kTileRows * kSlots);
        pieces.take(lse, 4 * kTileRows);
        pieces.take(asked, 2 * kTileRows);
        pieces.take(segments, kTileRows * static_cast<int64_t>(sizeof(Segment)));
        pieces.take(entries, 4 * kMostEntries);
        pieces.take(slots, 2 * kMostEntries);
        return pieces.bytes;
    }
};

MaxScratch scratch_of(const ops::ScoreMaxParams& p, int worker) {
    MaxScratch s{};
    const int64_t bytes = s.lay_out(nullptr, padded_dim(p.head_dim));
    s.lay_out(static_cast<unsigned char*>(p.workspace) + bytes * worker, padded_dim(p.head_dim));
    return s;
}

// How a call is cut into units: chunks of the entries of each row.
struct MaxPlan {
    explicit MaxPlan(const ops::ScoreMaxParams& p) {
        int64_t entries = 0;
        for (int r = 0; r < p.n_rows; ++r) {
            entries += p.rows[r].entries;
            longest = std::max(longest, p.rows[r].entries);
        }
        const int64_t queries = int64_t{p.group} * (p.spans[p.n_spans] - p.spans[0]);
        threads = entries * ((queries + kTileRows - 1) / kTileRows) <= kAloneVisits ? 1 : std::max(1, p.threads);
        const int64_t share = entries / (int64_t{threads} * kUnitsPerThread);
        chunk = static_cast<int>(std::clamp<int64_t>(share, kLeastEntries, kMostEntries));
        chunks = (longest + chunk - 1) / chunk;
    }
    int32_t longest = 0;  // entries of a row
    int threads, chunk, chunks;
};

// A chunk of a row's entries under all span queries.
class MaxUnit {
  public:
    MaxUnit(const ops::ScoreMaxParams& params, const Kernels& kernels, const MaxScratch& scratch, int row, int begin,
            int end)
        : p_(params), kernels_(kernels), s_(scratch), r_(row), begin_(begin), end_(end), row_(params.rows[row]) {
        const int first = p_.spans[0];
        row_.queries = p_.spans[p_.n_spans] - first;
        row_.q = static_cast<const char*>(row_.q) + first * row_.q_stride_t * dtype_bytes(p_.q_dtype);
        lse_ = p_.lse + r_ * p_.lse_stride_r + first;
    }

    void run() {
        find_entries();
        for (int first = 0; count_ && first < p_.group * row_.queries; first += kTileRows) raise(first);
        for (int e = 0; e < p_.n_spans; ++e) {
            for (int i = 0; i < count_; ++i) kernels_.exp_slots(out(e, s_.entries[i]), s_.slots[i]);
        }
    }

  private:
    float* out(int span, int entry) const {
        return p_.out + span * p_.out_stride_e + r_ * p_.out_stride_r + static_cast<int64_t>(entry) * kSlots;
    }

    // Those with visible slots, whose maxima are -inf so far; the others' scores are 0.
    void find_entries() {
        for (int entry = begin_; entry < end_; ++entry) {
            const uint16_t visible = row_.visible ? row_.visible[entry] : kAllSlots;
            const bool read = visible && row_.pages[entry] >= 0;
            for (int e = 0; e < p_.n_spans; ++e) std::fill_n(out(e, entry), kSlots, read ? kMinusInf : 0.0f);
            if (!read) continue;
            s_.entries[count_] = entry, s_.slots[count_] = visible;
            ++count_;
        }
    }

    // Log-sum-exps and spans of a block's queries. Returns the number of segments.
    int look_up(int first, int count) {
        int n = 0;
        for (int i = 0, span = 0; i < count; ++i) {
            const int t = (first + i) % row_.queries, at = p_.spans[0] + t;
            const float lse = lse_[(first + i) / row_.queries * p_.lse_stride_g + t];
            s_.lse[i] = lse == kMinusInf ? 0.0f : lse;
            s_.asked[i] = lse == kMinusInf ? 0 : kAllSlots;
            const bool same = n && t && at < p_.spans[span + 1];
            if (!same) {
                span = static_cast<int>(std::upper_bound(p_.spans, p_.spans + p_.n_spans + 1, at) - p_.spans) - 1;
                s_.segments[n++] = {i, i, span};
            }
            s_.segments[n - 1].end = i + 1;
        }
        return n;
    }

    // Maxima over one more block of queries, first .. of [G, T].
    void raise(int first) {
        const int count = std::min(kTileRows, p_.group * row_.queries - first), tile = kernels_.window_rows;
        WindowBlock block(p_, kernels_, s_.block, row_, r_, first, count, (count + tile - 1) / tile * tile);
        block.load();
        const int segments = look_up(first, count);
        for (int k = 0; k < count_; ++k) {
            for (int i = 0; i < count; ++i) s_.block.masks[i] = s_.asked[i] & s_.slots[k];
            const int entry = s_.entries[k];
            block.visit(row_.pages[entry], k + 1 < count_ ? row_.pages[s_.entries[k + 1]] : -1, s_.z);
            for (const Segment* s = s_.segments; s < s_.segments + segments; ++s) {
                kernels_.raise_most(s_.z + s->begin * kSlots, s_.lse + s->begin, s->end - s->begin,
                                    out(s->span, entry));
            }
        }
    }

    const ops::ScoreMaxParams& p_;
    const Kernels& kernels_;
    const MaxScratch s_;
    const int r_, begin_, end_;
    ops::WindowRow row_;  // with the queries of all spans, and no others
    const float* lse_;    // of them
    int count_ = 0;       // entries that are read
};

}  // namespace

int64_t score_max_workspace_bytes(const ops::ScoreMaxParams& p) {
    MaxScratch none{};
    return none.lay_out(nullptr, padded_dim(p.head_dim)) * std::max(1, p.threads);
}

void score_max(const ops::ScoreMaxParams& p) {
    const Kernels& k = kernels();
    const MaxPlan plan(p);
    for (int worker = 0; worker < plan.threads; ++worker) scratch_of(p, worker).block.loaded->row = -1;
    parallel(int64_t{p.n_rows} * plan.chunks, plan.threads, [&](int64_t unit, int worker) {
        const int r = static_cast<int>(unit / plan.chunks);
        const int begin = static_cast<int>(unit % plan.chunks) * plan.chunk, entries = p.rows[r].entries;
        if (begin >= entries) return;
        MaxUnit(p, k, scratch_of(p, worker), r, begin, std::min(entries, begin + plan.chunk)).run();
    });
}

}  // namespace kvstrata::cpu
