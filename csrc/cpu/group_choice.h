// Which blocks of a row are scored where groups of pages are looked at first: two levels of ops/score_pages.h.
#pragma once

#include "cpu/page_scan.h"
#include "ops/score_pages.h"

namespace kvstrata::cpu {

// What the choice works in and leaves, of a row of so many entries.
struct GroupPlaces {
    float *x, *shares, *vote;  // [G, lanes], [G, lanes], [lanes]
    uint64_t* keys;            // [lanes]
    uint16_t *there, *chosen;  // [lanes / 16]
    int32_t* blocks;           // [ceil(entries / 16)]

    static int lanes(int64_t entries);  // places of its groups, a multiple of 16
};

// Leaves in places.blocks the blocks that are scored, rising, and in places.x the logits of the other groups, -inf elsewhere.
// Returns how many blocks there are. `scan` has the query heads.
int choose_groups(const ops::SelectParams& params, const ops::SelectRow& row, const PageScan& scan,
                  const GroupPlaces& places);

}  // namespace kvstrata::cpu
