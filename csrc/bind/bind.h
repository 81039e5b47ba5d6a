// The native module's parts. Only this folder sees pybind11.
#pragma once

#include <pybind11/pybind11.h>

namespace kvstrata::bind {

void bind_ops(pybind11::module_& m);    // ops on tensor views, instruction-set levels
void bind_store(pybind11::module_& m);  // Store: tables, pools, steps

}  // namespace kvstrata::bind
