// Where things lie inside a page (arrangement version 1, the CPU's and that of saved files).
//
//   page = [K codes][V codes]            (full formats; quantized formats append their scales)
//
// Every 64-byte line holds 16 slots x one 4-byte operand, so no kernel needs a horizontal sum:
//   f32          K [D][16]                V [16][D]
//   bf16, f16    K [D/2][16 slots][2]     V [8][D][2 slots]
// D is padded with zeros to a multiple of 16 ("Dp"), so that every line is whole.
#pragma once

#include "common/types.h"

namespace kvstrata {

inline constexpr int kMaxHeadDim = 512;

constexpr int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

// Bytes of K (or of V) of one page of a full format, of the whole page, and of the page's slot positions (int32 [16]).
constexpr int64_t half_bytes(Format f, int head_dim) {
    return static_cast<int64_t>(kSlots) * padded_dim(head_dim) * format_bytes(f);
}
constexpr int64_t page_bytes(Format f, int head_dim) { return 2 * half_bytes(f, head_dim); }
inline constexpr int64_t kPositionBytes = kSlots * static_cast<int64_t>(sizeof(int32_t));

}  // namespace kvstrata
