// Large pages of memory for slabs: random pages of a cache are far apart, and with small ones each costs a table walk.
#pragma once

#include <cstdint>

namespace kvstrata {

// Asks for huge pages where a range holds whole ones. A refusal is not an error. To be asked before memory is first touched.
void hint_huge_pages(void* data, int64_t bytes);

}  // namespace kvstrata
