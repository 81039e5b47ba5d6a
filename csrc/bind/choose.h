// A selector of the caller's, for a store (choose.cpp).
#pragma once

#include <pybind11/pybind11.h>

#include "store/reading.h"

namespace kvstrata::bind {

// None: none. choose(R, G, D, M, dtype of q, scale, K, q, blocks, visible, lse_base) -> R lists of at most K entries.
store::Choose choose_by(const pybind11::object& choose);

}  // namespace kvstrata::bind
