// Errors. The caller's fault: Invalid (ValueError) or Unsupported (a ValueError too). Ours: assert.
// The machine's: MachineError (RuntimeError) with call and place. A message names argument, expected and actual.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace kvstrata {

struct Invalid : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};
struct Unsupported : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

struct MachineError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string message(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// check(n > 0, "attend: n is ", n, ", expected > 0")
template <class... Parts>
void check(bool ok, const Parts&... parts) {
    if (!ok) [[unlikely]]
        throw Invalid(message(parts...));
}

}  // namespace kvstrata
