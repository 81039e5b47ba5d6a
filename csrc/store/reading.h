// What a step of one token reads where not all is read, what is known of that afterwards, and what it works in.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "common/types.h"
#include "ops/attend.h"
#include "ops/score_pages.h"
#include "pages/near.h"
#include "pages/row.h"
#include "store/copier.h"
#include "store/index.h"

namespace kvstrata::store {

// What is read to choose: summaries; or all, to see what they and the packing lose. `tokens`: the best tokens, not their pages.
enum class Oracle : uint8_t { none = 0, pages = 1, tokens = 2 };

// What a step of one token reads of what is neither sink nor tail; others read all.
struct Recall {
    int pages = 0;       // K of each row; 0: every step reads all
    int near_pages = 0;  // C: Near copies of Far pages that a row keeps, at least what it may read, or 0
    float weight = 1.0f;
    ops::Aggregate aggregate = ops::Aggregate::sum;
    SummaryKind kind = SummaryKind::mean;
    int most = 0;           // pages of one row, where the rows of a sequence share K each by their votes; 0: K
    float mass = 0.0f;      // share of attention at which a row stops, 0: none,
    int least = 0;          // but for so many pages
    float estimate = 0.0f;  // of the pages that are not read, the share that stand in by their means
    Oracle oracle = Oracle::none;
    int flat_pages = std::numeric_limits<int>::max();  // sealed entries of a row above which groups are scored first
    double expand = 0.25;                              // share of the groups that is looked into
    int reuse = 1;  // so many indexed layers read what the first of them has selected
    int audit = 0;  // of so many steps, one row of one layer is read whole to compare; 0: none

    int widest() const { return most > 0 ? most : pages; }
};

// Of the attention mass of selecting steps, the share that they are estimated to have read, over rows and query heads.
struct Captured {
    double sum = 0.0;
    float least = 1.0f;
    int64_t count = 0, below = 0;  // below the floor
};

// Likewise of rows that were read whole beside: the share as it was estimated, and as it was.
struct Audited {
    double estimated = 0.0, exact = 0.0;
    int64_t count = 0;
};

// A Near page whose bytes are on their way, for a row of the call.
struct Due {
    int32_t row, entry;  // whose Near copy it is; -1: the ring's
    Ticket ticket;
};

// Far pages that were not there at once, for how long steps have waited for them, and those that were asked for ahead of a step.
struct Late {
    int64_t pages = 0;
    double seconds = 0.0;
    int64_t hinted = 0;
};

// How Far pages come while a step goes on.
struct Ahead {
    bool on = true;
    std::chrono::milliseconds limit{60'000};  // that one may take
    std::unique_ptr<Copier> copier;           // once a disk had to be waited for
    std::vector<FarPage> hints;               // scratch
    Late late;
};

// A Far page that a row's last step selected; it stands while the row's entry is that page.
struct Sought {
    int32_t entry;
    PageId page;
};

// Scratch of a call that attends in parts, kept between calls.
struct Parts {
    std::vector<ops::AttendRow> whole;  // the rows of the call
    std::vector<pages::Row*> rows;
    std::vector<const Index*> indices;
    std::vector<float> out[3], lse[3], rest;  // of the parts [rows, T, G, D], [rows, T, G], and of what is not read
    std::vector<PageId> pages;                // the lists of a part, one after another
    std::vector<uint16_t> masks, picked;      // of a part's lists; of the tokens that an oracle has chosen
    std::vector<size_t> ends;                 // [rows + 1]
    std::vector<int32_t> tokens, selected, zone, far;
    std::vector<uint8_t> unmeasured;  // [rows] nothing is known of what they do not read
    std::vector<int32_t> ready;       // rows that one call attends
    std::vector<Due> due;             // rising rows
    std::vector<float> votes, x;      // of the selected pages, if rows share them: [rows, K], [rows, G, K]
    std::vector<float> exact;         // [G] log-sum-exps of the row that is audited
    std::vector<ops::SelectRow> select;
    std::vector<pages::Miss> misses;

    int64_t bytes() const;
};

// What the rows of a layer have selected in the open step, for the layers that follow it.
struct Chosen {
    int layer = -1;
    std::vector<int32_t> selected, count;  // [rows, K], [rows]

    int64_t bytes() const { return static_cast<int64_t>((selected.capacity() + count.capacity()) * sizeof(int32_t)); }
};

// A selector of the caller's: fills `selected` and `count` of the rows, which have what ops::select reads.
using Choose = std::function<void(const ops::SelectParams&)>;

float logaddexp(float a, float b);  // of two log-sum-exps

}  // namespace kvstrata::store
