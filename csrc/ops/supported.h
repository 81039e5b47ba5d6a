// What the ops support, named once: dispatch checks against it, messages quote it, the tests' matrix is read from it.
#pragma once

#include "common/layout.h"
#include "common/types.h"

namespace kvstrata::ops {

inline constexpr int kMaxGroup = 16;                                        // G, query heads per KV head
inline constexpr int kMaxTreeOwn = 64;                                      // own tokens a tree mask (u64) can name
inline constexpr int kTunedDims[] = {64, 80, 96, 112, 128, 160, 192, 256};  // other D up to kMaxHeadDim run the same
                                                                            // kernels, with a tail where D % 16 != 0
inline constexpr Format kFormats[] = {Format::f32, Format::bf16, Format::f16};
inline constexpr Format kQuantized[] = {Format::int8, Format::int4, Format::int2};  // D a multiple of 16 from 32

constexpr bool is_float(DType t) { return t <= DType::f16; }

inline const char* name(Format f) {
    constexpr const char* kNames[] = {"f32", "bf16", "f16", "int8", "int4", "int2"};
    return kNames[static_cast<int>(f)];
}
inline const char* name(DType t) {
    constexpr const char* kNames[] = {"f32", "bf16", "f16", "u8", "u16", "i32", "i64", "u64", "i8"};
    return kNames[static_cast<int>(t)];
}
inline const char* name(SummaryKind k) {
    constexpr const char* kNames[] = {"mean", "bounds", "mean_value", "halves", "quarters"};
    return kNames[static_cast<int>(k)];
}

}  // namespace kvstrata::ops
