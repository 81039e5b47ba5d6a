// The part of Store's binding that is about sets of pages, and rows kept elsewhere.
#pragma once

#include <pybind11/pybind11.h>

#include "store/store.h"

namespace kvstrata::bind {

void bind_sets(pybind11::module_& m, pybind11::class_<store::Store>& store);

}  // namespace kvstrata::bind
