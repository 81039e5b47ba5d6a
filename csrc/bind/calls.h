// Tensors of a step's calls as bare numbers: addresses and element strides, checked by the caller in Python.
#pragma once

#include <cstdint>
#include <tuple>

#include "store/call.h"

namespace kvstrata::bind {

using Address = uintptr_t;
using Strides = std::tuple<Address, int64_t, int64_t, int64_t>;  // data, elements per sequence, token, head

inline store::TokenTensor tensor(const Strides& s) {
    const auto [data, batch, token, head] = s;
    return {reinterpret_cast<void*>(data), batch, token, head};
}

inline store::AttendCall call(const Strides& q, const Strides& out, const Strides& lse, Address sinks, int out_dtype,
                              float scale, float softcap, int threads) {
    return {tensor(q), tensor(out), tensor(lse), reinterpret_cast<const float*>(sinks), static_cast<DType>(out_dtype),
            scale,     softcap,     threads};
}

}  // namespace kvstrata::bind
