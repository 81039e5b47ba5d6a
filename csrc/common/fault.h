// Fault points for tests: a named place can be armed to throw once, at its nth visit. One relaxed load when off.
#pragma once

#include <atomic>

namespace kvstrata::fault {

inline constinit std::atomic<bool> armed{false};

void visit(const char* point);         // throws MachineError if `point` is the armed one and its turn came
void arm(const char* point, int nth);  // nth >= 1; null disarms
int visits();                          // of the armed point so far

inline void hit(const char* point) {
    if (armed.load(std::memory_order_relaxed)) [[unlikely]]
        visit(point);
}

}  // namespace kvstrata::fault
