// The environment variables the library reads, all of them, once.
#pragma once

#include <string>

namespace kvstrata {

struct Settings {
    std::string isa;           // KVSTRATA_ISA: highest instruction-set level to use; empty: the best present
    bool check = false;        // KVSTRATA_CHECK: 1 also checks page ids inside the ops
    std::string log = "warn";  // KVSTRATA_LOG: debug, info, warn, error
};

const Settings& settings();

}  // namespace kvstrata
