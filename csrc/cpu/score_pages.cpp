#include "ops/score_pages.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>

#include "common/layout.h"
#include "cpu/best.h"
#include "cpu/group_choice.h"
#include "cpu/merge.h"
#include "cpu/page_scan.h"
#include "cpu/parallel.h"
#include "cpu/places.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr float kHidden = -0.5f;  // above the vote of what is hidden, -1, and below any other
constexpr int kAhead = 4;         // blocks: one is sooner scored than fetched
constexpr int kShort = 64;  // entries that are kept in order while all are looked at; of more, the best are parted off

int blocks_of(int entries) { return (entries + kSlots - 1) / kSlots; }

int64_t longest(const ops::SelectParams& p) {
    int64_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) most = std::max<int64_t>(most, blocks_of(p.rows[r].entries) * kSlots);
    return most;
}

// What a thread works in, for rows of up to `entries` (padded) entries.
struct Scratch {
    float *x, *vote;
    uint64_t* keys;
    uint16_t* there;
    GroupPlaces groups;
    unsigned char* scan;
    int64_t bytes;

    Scratch(const ops::SelectParams& p, int64_t entries, void* base) {
        Places places(base);
        const int lanes = GroupPlaces::lanes(entries);  // they follow the entries
        x = places.take<float>((entries + lanes) * p.group);
        vote = places.take<float>(entries + lanes);
        keys = places.take<uint64_t>(entries);
        there = places.take<uint16_t>((entries + lanes) / kSlots);
        groups = {
            places.take<float>(int64_t{lanes} * p.group), x, vote, keys, there, places.take<uint16_t>(lanes / kSlots),
            places.take<int32_t>(entries / kSlots)};
        scan = places.take<unsigned char>(PageScan::bytes(p.group, p.head_dim));
        bytes = places.bytes();
    }
};

class Selection {
  public:
    Selection(const ops::SelectParams& params, ops::SelectRow& row, const Scratch& scratch)
        : p_(params),
          row_(row),
          w_(scratch),
          blocks_(blocks_of(row.entries)),
          padded_(blocks_ * kSlots),
          scan_(
              {params.group, params.head_dim, params.q_dtype, params.kind, params.scale, params.weight, params.softcap},
              scratch.scan) {}

    // The entry whose x is not finite, or -1.
    int run(bool choose) {
        row_.count = row_.zone_count = 0;
        scan_.encode(row_.q, row_.q_stride_g);
        if (choose && row_.group_blocks && row_.groups > 0) choose_blocks();
        if (const int bad = score(); bad >= 0) return bad;
        if (row_.x) {
            for (int g = 0; g < p_.group; ++g) {
                std::copy_n(x_of(g), row_.entries, row_.x + static_cast<int64_t>(g) * row_.entries);
            }
        }
        if (!choose) return -1;
        vote();
        pick();
        if (row_.zone) fill_zone();
        if (row_.lse_rest) rest();
        for (int i = 0; listed_ && i < row_.count; ++i) row_.selected[i] = entry_of(row_.selected[i]);
        return -1;
    }

  private:
    // Of two levels: the blocks that are scored lie side by side, and after them the groups that are not looked into.
    void choose_blocks() {
        blocks_ = choose_groups(p_, row_, scan_, w_.groups);
        listed_ = true;
        others_ = (row_.groups + kSlots - 1) / kSlots * kSlots;
        padded_ = blocks_ * kSlots + others_;
    }

    int block(int i) const { return listed_ ? w_.groups.blocks[i] : i; }
    int entry_of(int place) const { return block(place / kSlots) * kSlots + place % kSlots; }
    float* x_of(int g) const { return w_.x + static_cast<int64_t>(g) * padded_; }

    // The masks of a block's lanes: 0 for those beyond the row and before its first entry.
    const uint16_t* masks_of(int b, uint16_t* room) const {
        const int from = b * kSlots;
        if (from >= row_.first && from + kSlots <= row_.entries) return row_.visible + from;
        for (int lane = 0; lane < kSlots; ++lane) {
            const int e = from + lane;
            room[lane] = e >= row_.first && e < row_.entries ? row_.visible[e] : uint16_t{0};
        }
        return room;
    }

    // The first entry that cannot be ranked, or -1.
    int score() {
        uint16_t room[kSlots];
        int bad = -1;
        for (int i = 0; i < blocks_; ++i) {
            const int b = block(i);
            const unsigned char* const ahead = row_.blocks[block(std::min(i + kAhead, blocks_ - 1))];
            const uint16_t lanes = scan_.score(row_.blocks[b], ahead, masks_of(b, room), w_.x + i * kSlots, padded_);
            w_.there[i] = scan_.there();
            if (lanes && bad < 0) bad = b * kSlots + std::countr_zero(lanes);
        }
        for (int g = 0; others_ > 0 && g < p_.group; ++g) {
            std::copy_n(w_.groups.x + static_cast<int64_t>(g) * others_, others_, x_of(g) + blocks_ * kSlots);
        }
        std::fill_n(w_.there + blocks_, others_ / kSlots, uint16_t{0});
        return bad;
    }

    // The largest x of a head: of the scored entries and the other groups.
    float most_of(int g) const {
        return std::max(scan_.largest(g), kernels_.largest(x_of(g) + blocks_ * kSlots, others_));
    }

    void vote() {
        float share[ops::kMaxGroup];
        steady_ = 0.0f;
        for (int g = 0; g < p_.group; ++g) {
            const float base = row_.lse_base ? row_.lse_base[g] : kMinusInf;
            largest_[g] = most_of(g), share[g] = 0.0f;
            if (largest_[g] == kMinusInf) {
                std::fill_n(x_of(g), padded_, 0.0f);
                continue;
            }
            const float total = kernels_.exp_sum(x_of(g), largest_[g], padded_);
            const float outside = std::exp(base - largest_[g]);  // may be inf: then nothing here counts
            const float all = total + outside;
            if (all > 0.0f) share[g] = 1.0f / all;
            steady_ += std::isinf(outside) ? 1.0f : outside * share[g];
        }
        kernels_.count_votes(w_.x, padded_, share, p_.group, padded_, p_.aggregate == ops::Aggregate::sum, w_.there,
                             w_.vote);
    }

    void pick() {
        if (!row_.selected || row_.most == 0) return;
        int32_t* const best = row_.selected;
        int n = row_.most <= kShort ? keep_best(kernels_, w_.vote, padded_, kHidden, row_.most, best) : part();
        if (p_.mass > 0.0f) n = enough(n);
        std::sort(best, best + n);
        std::fill(best + n, best + row_.most, -1);
        for (int i = 0; row_.votes && i < n; ++i) row_.votes[i] = w_.vote[best[i]];
        row_.count = n;
        for (int g = 0; row_.selected_x && g < p_.group; ++g) {
            float* const out = row_.selected_x + static_cast<int64_t>(g) * row_.most;
            for (int i = 0; i < n; ++i) out[i] = log_of(g, x_of(g)[best[i]]);
        }
    }

    // Once the votes are counted, x stands as its part of a head's largest.
    float log_of(int g, float part) const { return part > 0.0f ? largest_[g] + std::log(part) : kMinusInf; }

    // Of many: larger for a higher vote, which is 0 or more, and of equal ones for the lower index.
    uint64_t key(int e) const {
        return static_cast<uint64_t>(std::bit_cast<uint32_t>(w_.vote[e])) << 32 | ~static_cast<uint32_t>(e);
    }

    int part() {
        int n = 0;
        each_there([&](int e) { w_.keys[n++] = key(e); });
        const int kept = std::min(n, row_.most);
        if (kept < n) std::nth_element(w_.keys, w_.keys + kept, w_.keys + n, std::greater<>());
        if (p_.mass > 0.0f) std::sort(w_.keys, w_.keys + kept, std::greater<>());
        for (int i = 0; i < kept; ++i) row_.selected[i] = static_cast<int32_t>(~static_cast<uint32_t>(w_.keys[i]));
        return kept;
    }

    // How many of the n best, in falling order, reach the mass.
    int enough(int n) const {
        const float wanted = p_.mass * static_cast<float>(p_.group);
        float held = steady_;
        for (int k = 0; k < n; ++k) {
            if (k >= p_.least && held >= wanted) return k;
            held += w_.vote[row_.selected[k]];
        }
        return n;
    }

    template <class Visit>
    void each_there(Visit visit) const {
        for (int b = 0; b < blocks_; ++b) {
            for (uint32_t lanes = w_.there[b]; lanes; lanes &= lanes - 1) visit(b * kSlots + std::countr_zero(lanes));
        }
    }

    // Entries that were not selected and whose value mean tells of no hidden slot.
    template <class Visit>
    void each_outside(Visit visit) const {
        int next = 0;
        each_there([&](int e) {
            if (next < row_.count && row_.selected[next] == e) {
                ++next;
                return;
            }
            const unsigned char* const slots = row_.blocks[block(e / kSlots)] + value_slots_offset(p_.head_dim);
            if (reinterpret_cast<const uint32_t*>(slots)[e % kSlots] == row_.visible[entry_of(e)]) visit(e);
        });
    }

    void fill_zone() {
        int n = 0, kept = 0;
        each_outside([&](int e) { w_.keys[n++] = key(e); });
        uint64_t least = 0;
        if (n > row_.zone_most && row_.zone_most > 0) {
            uint64_t* const last = w_.keys + row_.zone_most - 1;
            std::nth_element(w_.keys, last, w_.keys + n, std::greater<>());
            least = *last;
        }
        if (row_.zone_most > 0) {
            each_outside([&](int e) {
                if (key(e) >= least) row_.zone[kept++] = entry_of(e);
            });
        }
        std::fill(row_.zone + kept, row_.zone + row_.zone_most, -1);
        row_.zone_count = kept;
    }

    void rest() {
        for (int g = 0; g < p_.group; ++g) {
            float* const x = x_of(g);
            for (int i = 0; i < row_.count; ++i) x[row_.selected[i]] = 0.0f;
            row_.lse_rest[g] = log_of(g, kernels_.sum(x, padded_));
        }
    }

    const ops::SelectParams& p_;
    ops::SelectRow& row_;
    const Scratch& w_;
    const Kernels& kernels_ = kernels();
    int blocks_, others_ = 0, padded_;  // scored ones; lanes of the other groups; both together
    bool listed_ = false;
    PageScan scan_;
    float steady_ = 0.0f;  // the share of what is read anyway, summed over the heads
    float largest_[ops::kMaxGroup];
};

void run(const char* op, const ops::SelectParams& p, bool choose) {
    const int64_t entries = longest(p), bytes = Scratch(p, entries, nullptr).bytes;
    FirstUnranked unranked;
    parallel(p.n_rows, p.threads, [&](int64_t r, int worker) {
        const Scratch scratch(p, entries, part_of(p.workspace, bytes, worker));
        p.rows[r].unranked = Selection(p, p.rows[r], scratch).run(choose);
        unranked.note(r, p.rows[r].unranked);
    });
    unranked.refuse(op);
}

}  // namespace

int64_t select_workspace_bytes(const ops::SelectParams& p) {
    return Scratch(p, longest(p), nullptr).bytes * std::max(1, std::min(p.threads, p.n_rows));
}

void select(const ops::SelectParams& p) { run("select", p, true); }
void score_pages(const ops::SelectParams& p) { run("score_pages", p, false); }

}  // namespace kvstrata::cpu
