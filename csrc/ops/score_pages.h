// score_pages: the log of each page's estimated attention mass, by summaries alone. select: the pages that a row reads by it.
//
//   n_p = visible slots of an entry; 0: never selected        R q = delta * codes, delta = max |R q| / 127, rne, int8
//   x[g, p]     = scale * delta_g * s_p * (codes_g . (code_p - 128)) + w/2 * scale^2 * |q_g|^2 * spread_p + log n_p
//   Z[g]        = logaddexp(logsumexp_p x[g, p], lse_base[g])
//   vote[p]     = sum_g exp(x[g, p] - Z[g])                    or their maximum
//   selected    = the K entries of highest vote, ties the lower index, by rising index
//   lse_rest[g] = logsumexp of x[g, p] over the others
//
// x is the log of a page's estimated attention mass: w = 0 takes every key for the mean, w = 1 adds the second-order term of
// log mean exp. The dot is exact; sums over pages in f32, in one order: bits depend on the row alone. x that is not finite
// though something is visible is refused: it would hide a page. What is e^-87 of the largest mass and below counts as none.
// On a CUDA device it is for the caller to refuse such a row, by `found`: it selects nothing.
//
//   kind bounds   x[g, p] = scale * sum_c max(q_c lo_c, q_c hi_c) + log n_p    q in f32, not rotated; w is not read: at
//                           least the log of the page's mass, but for the rounding of f32 sums. scale >= 0
//   parts         kinds halves, quarters: x = log sum exp over the parts of x as kind mean has it, by a part's own mean (codes less 8), spread and visible
//                 slots; slots that were not visible when it was made count to the first part
//   softcap       what the scale multiplies becomes softcap * tanh(. / softcap) before anything is added, as in attention
//   mass          > 0: K is the least in least..most with (sum_g exp(lse_base[g] - Z[g]) + the K highest votes) / G >= mass,
//                 most if there is none, summed in f32 by falling vote; aggregate sum only
//   groups        where given, the row's first `groups` times 32 entries are looked at in two levels: a group's x is that of a
//                 page of all its visible slots by its mean (summarize_groups.h), w = 0, and its vote as a page's; only entries
//                 of the `expand` groups of highest vote, ties the lower index, are scored, and those of groups whose x is
//                 not finite. The others are not selected and in no zone; their groups enter Z and lse_rest by their x. Kinds mean
//                 and mean_value only. score_pages scores all.
//   zone          of the entries not selected, the zone_most of highest vote, ties the lower index, by rising index; without
//                 those whose value mean was made from other slots than the visible ones, which may hold hidden ones. Only
//                 of kind mean_value. lse_rest is over all entries not selected, in the zone or not
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata::ops {

enum class Aggregate : uint8_t { sum = 0, max = 1 };

struct SelectRow {                       // one (sequence, KV head)
    const void* q;                       // [G, D] by the stride below
    int64_t q_stride_g;                  // elements
    const unsigned char* const* blocks;  // [ceil(M / 16)] summaries; on a CUDA device the array lies there too
    const uint16_t* visible;             // [M] slot masks
    const float* lse_base;               // [G] of what is read anyway, or null: -inf
    int32_t first;                       // entries before this one are not selected
    int32_t entries;                     // M
    int32_t most;                        // K of this row
    int32_t* selected;                   // [most] out, the rest -1; or null: none are wanted
    float* lse_rest;                     // [G] out, or null
    float* x;                            // [G, M] out, or null
    int32_t count;                       // out: how many are selected
    int32_t unranked = -1;               // out: the first entry whose x is not finite, or -1
    int32_t* zone = nullptr;             // [zone_most] out, the rest -1; or null: none are wanted
    int32_t zone_most = 0;
    int32_t zone_count = 0;                              // out
    float* votes = nullptr;                              // [most] out: of the selected ones; or null
    float* selected_x = nullptr;                         // [G, most] out: likewise, x
    const unsigned char* const* group_blocks = nullptr;  // [ceil(groups / 16)] of kind mean; or null: one level
    int32_t groups = 0;                                  // whole ones, of 32 entries
    int32_t expand = 0;                                  // of them, how many are looked into
    int32_t* found = nullptr;  // [3] out on a CUDA device alone, instead of count, unranked and zone_count; or null
};

struct SelectParams {
    SelectRow* rows;  // [R]
    int32_t n_rows;
    int32_t group;     // G, 1..16
    int32_t head_dim;  // D, a multiple of 16 in 32..512
    DType q_dtype;     // f32, bf16, f16
    float scale;       // finite
    float weight;      // w, 0 or more
    Aggregate aggregate;
    void* workspace;  // select_workspace_bytes(params) bytes, 64-byte aligned
    int32_t threads;
    SummaryKind kind = SummaryKind::mean;
    float softcap = 0.0f;  // 0: none
    float mass = 0.0f;     // 0..1, 0: K is `most` of the row
    int32_t least = 0;     // with mass: entries of every row that has so many
};

int64_t select_workspace_bytes(const SelectParams& params, const Where& where = {});
void select(const SelectParams& params, const Where& where = {});
void score_pages(const SelectParams& params, const Where& where = {});  // x only

}  // namespace kvstrata::ops
