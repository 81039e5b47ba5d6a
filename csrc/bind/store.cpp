#include "bind/bind.h"

namespace kvstrata::bind {
void bind_store(pybind11::module_&) {}
}  // namespace kvstrata::bind
