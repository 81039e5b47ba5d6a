#include "common/checksum.h"

#include <bit>
#include <cstring>

namespace kvstrata {

uint64_t checksum(const void* bytes, int64_t n) {
    constexpr uint64_t kOdd[4] = {0x9E3779B185EBCA87u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u, 0x85EBCA77C2B2AE63u};
    uint64_t lanes[4] = {kOdd[0], kOdd[1], kOdd[2], kOdd[3]};
    const auto* at = static_cast<const unsigned char*>(bytes);
    for (int64_t i = 0; i < n; i += 32, at += 32) {
        uint64_t words[4];
        std::memcpy(words, at, 32);
        for (int lane = 0; lane < 4; ++lane) {
            lanes[lane] = std::rotl(lanes[lane] + words[lane] * kOdd[1], 31) * kOdd[0];
        }
    }
    uint64_t sum = static_cast<uint64_t>(n);
    for (uint64_t lane : lanes) sum = (std::rotl(sum, 27) ^ lane) * kOdd[2] + kOdd[3];
    return sum ^ sum >> 29;
}

}  // namespace kvstrata
