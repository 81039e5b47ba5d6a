#include "ops/settings.h"

#include <cstdlib>

namespace kvstrata {

static std::string read(const char* variable, const char* fallback) {
    const char* value = std::getenv(variable);
    return value && *value ? value : fallback;
}

const Settings& settings() {
    static const Settings once = [] {
        Settings s;
        s.isa = read("KVSTRATA_ISA", "");
        s.check = read("KVSTRATA_CHECK", "0") != "0";
        s.log = read("KVSTRATA_LOG", "warn");
        return s;
    }();
    return once;
}

}  // namespace kvstrata
