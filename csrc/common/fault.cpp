#include "common/fault.h"

#include <mutex>
#include <string>

#include "common/check.h"

namespace kvstrata::fault {
namespace {

struct Arming {
    std::mutex lock;
    std::string point;
    int nth = 0, seen = 0;
};

Arming& arming() {
    static Arming a;
    return a;
}

}  // namespace

void arm(const char* point, int nth) {
    Arming& a = arming();
    const std::lock_guard guard(a.lock);
    a.point = point ? point : "";
    a.nth = nth;
    a.seen = 0;
    armed.store(point != nullptr, std::memory_order_relaxed);
}

int visits() {
    Arming& a = arming();
    const std::lock_guard guard(a.lock);
    return a.seen;
}

void visit(const char* point) {
    Arming& a = arming();
    const std::lock_guard guard(a.lock);
    if (a.point != point) return;
    if (++a.seen == a.nth) throw MachineError("fault injected at " + a.point);
}

}  // namespace kvstrata::fault
