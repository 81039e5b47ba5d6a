// How summaries store means: codes with one scale.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/layout.h"

namespace kvstrata::cpu {

// The bf16 at or below x, or at or above it: towards zero is to cut bits off.
inline uint16_t outwards(float x, bool up) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), cut = bits >> 16;
    const bool away = (bits & 0xFFFF) != 0 && (bits >> 31 != 0) != up;
    return static_cast<uint16_t>(away ? cut + 1 : cut);
}
inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// x [dim] becomes what its codes in -levels..levels say, scale * c, or 0 and a scale of NaN where it is not finite. The scale is
// a bf16 number if `narrow`. put(d, code); the scale.
template <class Put>
float encode_mean(float* x, int dim, float levels, bool narrow, Put put) {
    float most = 0.0f, total = 0.0f;
    for (int d = 0; d < dim; ++d) most = std::max(most, std::abs(x[d])), total += std::abs(x[d]);
    const bool finite = std::isfinite(total);
    float scale = finite ? most / levels : std::numeric_limits<float>::quiet_NaN();
    if (narrow && finite) scale = from_bf16(outwards(scale, true));
    const float by = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int d = 0; d < dim; ++d) {
        const float c = finite ? std::clamp(std::nearbyint(x[d] * by), -levels, levels) : 0.0f;
        put(d, static_cast<int>(c));
        x[d] = scale * c;
    }
    return scale;
}

// The code of a channel in one lane of a block of kind mean, whose codes of that lane begin at `codes`.
inline uint8_t& code_of(uint8_t* codes, int d) { return codes[d / 4 * 4 * kSlots + d % 4]; }

}  // namespace kvstrata::cpu
