// A checksum of bytes that leave memory: 64 bits, four lanes of multiply and rotate. Not for secrets.
#pragma once

#include <cstdint>

namespace kvstrata {

uint64_t checksum(const void* bytes, int64_t n);  // n a multiple of 32

}  // namespace kvstrata
