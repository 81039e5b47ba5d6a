// Where things lie inside a page (arrangement version 1, the CPU's and that of saved files).
//
//   full formats        [K][V]
//   quantized formats   [K codes][V codes][K scales][V scales]       scales bf16 [groups][16 slots]
//
// Every 64-byte line holds 16 slots x one 4-byte operand, so no kernel needs a horizontal sum:
//   f32          K [D][16]                     V [16][D]
//   bf16, f16    K [D/2][16 slots][2]          V [8][D][2 slots]
//   int8         K [D/4][16 slots][4 dims]     V [4][D][4 slots]
//   int4         K [D/8][16][4] bytes: dims 8p..8p+3 in the low nibbles, 8p+4..8p+7 in the high ones
//                V [2][D][4] bytes: slot quad 2u in the low nibbles, 2u+1 in the high ones
//   int2         K [D/16][16][4] bytes: four successive int8 lines in bits 0-1, 2-3, 4-5, 6-7
//                V [1][D][4] bytes: the four slot quads likewise
// In other words: K of a slot is a column of 32-bit words, and V of a slot is one bit field in D successive words.
// Full formats pad D with zeros to a multiple of 16 ("Dp"), so that every line is whole; quantized formats need one.
#pragma once

#include "common/types.h"

namespace kvstrata {

inline constexpr int kMaxHeadDim = 512;
inline constexpr int kMinQuantizedDim = 32;
inline constexpr int kMinGroup = 16;  // dimensions that share a scale, at least
inline constexpr int kMaxGroups = kMaxHeadDim / kMinGroup;

constexpr int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

// Head dimensions that quantized formats can hold.
constexpr bool quantizable(int head_dim) {
    return head_dim % 16 == 0 && head_dim >= kMinQuantizedDim && head_dim <= kMaxHeadDim;
}

// Dimensions that share a scale. int8: all up to 128, else the largest of 128, 64, 32, 16 that divides D; int4 and int2:
// the same from 64 and from 32 down.
constexpr int group_size(Format f, int head_dim) {
    if (f == Format::int8 && head_dim <= 128) return head_dim;
    int size = f == Format::int8 ? 128 : f == Format::int4 ? 64 : 32;
    while (head_dim % size) size /= 2;
    return size;
}
// Scales of one vector.
constexpr int groups(Format f, int head_dim) { return is_full(f) ? 0 : head_dim / group_size(f, head_dim); }

// Bytes of the elements or codes of K (or of V) of one page, of its scales, of the whole page, and of the page's slot
// positions (int32 [16]).
constexpr int64_t half_bytes(Format f, int head_dim) {
    return static_cast<int64_t>(kSlots) * padded_dim(head_dim) * format_bits(f) / 8;
}
constexpr int64_t scale_bytes(Format f, int head_dim) { return 2 * kSlots * static_cast<int64_t>(groups(f, head_dim)); }
constexpr int64_t page_bytes(Format f, int head_dim) {
    return 2 * (half_bytes(f, head_dim) + scale_bytes(f, head_dim));
}
inline constexpr int64_t kPositionBytes = kSlots * static_cast<int64_t>(sizeof(int32_t));

// A block of summaries: 16 pages (lanes) together. D is a multiple of 16, a block one of 64 bytes.
//   mean         means u8 [D / 4][16][4], then f32 [16] each of scale, spread and radius
//   bounds       lo bf16 [D][16], hi bf16 [D][16]
//   mean_value   as mean, then value means u8 [16][D], their scale f32 [16], and the slots they were made from u32 [16]
//   halves       means of a pair of parts u4 [D / 4][16][4][2], the first one's in the low nibbles; then their scales bf16 [16][2]
//                and spreads bf16 [16][2], and the slots u32 [16] of the second part in the low half
//   quarters     likewise of two pairs: means, scales, spreads [2 pairs]...; the slots of the second part of either pair in the
//                low half, those of the second pair in the high half
constexpr bool is_split(SummaryKind kind) { return kind >= SummaryKind::halves; }
constexpr int pairs_of(SummaryKind kind) { return kind == SummaryKind::quarters ? 2 : 1; }  // of parts, if it is split
constexpr int64_t summary_bytes(int head_dim, SummaryKind kind = SummaryKind::mean) {
    const int64_t dim = head_dim, mean = kSlots * (dim + 12);
    if (kind == SummaryKind::bounds) return kSlots * 4 * dim;
    if (is_split(kind)) return kSlots * (pairs_of(kind) * (dim + 8) + 4);
    return kind == SummaryKind::mean ? mean : mean + kSlots * (dim + 8);
}
inline constexpr uint8_t kZeroCode = 128, kZeroNibble = 8;  // of a mean, of a part's mean: what 0 is stored as
inline constexpr uint8_t kZeroNibbles = 17 * kZeroNibble;   // in both nibbles

// Offsets inside a block: hi of bounds; of so many pairs one's means, scales, spreads, and the slots; of mean_value the value means, their scales and their slots.
constexpr int64_t upper_offset(int head_dim) { return kSlots * 2 * static_cast<int64_t>(head_dim); }
constexpr int64_t pair_offset(int head_dim, int pair) { return pair * kSlots * static_cast<int64_t>(head_dim); }
constexpr int64_t pair_scales_offset(int head_dim, int pairs, int pair) {
    return pair_offset(head_dim, pairs) + 4 * kSlots * pair;
}
constexpr int64_t pair_spreads_offset(int head_dim, int pairs, int pair) {
    return pair_scales_offset(head_dim, pairs, pairs + pair);
}
constexpr int64_t part_slots_offset(int head_dim, int pairs) { return pair_scales_offset(head_dim, pairs, 2 * pairs); }
constexpr int64_t values_offset(int head_dim) { return summary_bytes(head_dim); }
constexpr int64_t value_scales_offset(int head_dim) {
    return values_offset(head_dim) + kSlots * static_cast<int64_t>(head_dim);
}
constexpr int64_t value_slots_offset(int head_dim) { return value_scales_offset(head_dim) + 4 * kSlots; }

// Offsets inside a page: V, and the scales of K and of V.
constexpr int64_t v_offset(Format f, int head_dim) { return half_bytes(f, head_dim); }
constexpr int64_t k_scales_offset(Format f, int head_dim) { return 2 * half_bytes(f, head_dim); }
constexpr int64_t v_scales_offset(Format f, int head_dim) {
    return k_scales_offset(f, head_dim) + scale_bytes(f, head_dim);
}

}  // namespace kvstrata
