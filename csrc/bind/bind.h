// The native module's parts. Only this folder sees pybind11.
#pragma once

#include <pybind11/pybind11.h>

namespace kvstrata::bind {

void bind_ops(pybind11::module_& m);      // ops on tensor views
void bind_formats(pybind11::module_& m);  // of them, those that change a token's format or place
void bind_scores(pybind11::module_& m);   // of them, those that rank tokens
void bind_choices(pybind11::module_& m);  // of them, those that choose what tokens become
void bind_recall(pybind11::module_& m);   // of them, those that find pages for a query
void bind_isa(pybind11::module_& m);      // instruction-set levels, threads, settings
void bind_store(pybind11::module_& m);    // Store: tables, pools, steps
void bind_faults(pybind11::module_& m);   // for tests
void bind_graph(pybind11::module_& m);    // and those steps of it that a CUDA graph may hold

}  // namespace kvstrata::bind
