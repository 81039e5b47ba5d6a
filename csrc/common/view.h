// A tensor as it crosses the border: pointer, shape, strides, dtype, device. Owns nothing.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kvstrata {

inline constexpr int kMaxDims = 6;

struct TensorView {
    void* data = nullptr;
    int dims = 0;
    int64_t shape[kMaxDims] = {};
    int64_t strides[kMaxDims] = {};  // in elements
    DType dtype = DType::f32;
    Where where;
};

}  // namespace kvstrata
