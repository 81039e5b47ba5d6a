// Tiles: the eight matrix registers, in the four shapes that attend multiplies them in.
//
//   tiles 0..3  sums    [rows, 16]     f32 or int32
//   tiles 4, 5  left    [rows, depth]  words: a pair of bf16, or four signed bytes
//   tiles 6, 7  right   [depth, 16]    words, as the lines of a page hold them
// A product adds left . right to sums. Two bodies: the instructions, and plain code that does what they are said to do, for
// tests on machines without them. Whoever holds a Tiles has the registers of its thread: one at a time.
#pragma once

#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr int kRows = 16, kDepth = 16;  // of a tile, at the most: query rows, words

template <int Sums, int Left, int Right>
constexpr bool kProduct = Sums >= 0 && Sums < 4 && (Left == 4 || Left == 5) && (Right == 6 || Right == 7);

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA

#if defined(KV_ISA_amx)
#include "cpu/kernels/tiles_amx.h"
#else
#include "cpu/kernels/tiles_soft.h"
#endif

namespace kvstrata::cpu::KV_ISA {
namespace {

KV_INLINE void clear_sums(Tiles& tiles) { clear<0>(tiles), clear<1>(tiles), clear<2>(tiles), clear<3>(tiles); }

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
