// Codes and scales of one rotated vector, and back: the formulas of ops/quantize.h, sixteen dimensions at a time.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr float kLeast = 7.888609052210118e-31f;  // 2^-100: a group below it is stored as zeros
constexpr uint16_t kNanBf16 = 0x7FC0;
constexpr uint16_t kAllLanes = 0xFFFF;

// The bf16 of the next magnitude at or above; `x` is finite and far from the largest.
KV_INLINE uint32_t up(float x) { return (__builtin_bit_cast(uint32_t, x) + 0xFFFFu) & 0xFFFF0000u; }
KV_INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
KV_INLINE V magnitude(V x) { return bits_and(x, 0x7FFFFFFFu); }

// Largest magnitude of a group, or NaN if it holds a NaN or an Inf.
KV_INLINE float largest(const float* x, int group) {
    const V limit = set1(__builtin_inff());
    V most = zero();
    uint16_t finite = kAllLanes;
    for (int d = 0; d < group; d += 16) {
        const V a = magnitude(load(x + d));
        finite &= less(a, limit);
        most = max(most, a);
    }
    return finite == kAllLanes ? max_lane(most) : __builtin_nanf("");
}

// Whether the first element of magnitude `most` is negative.
KV_INLINE bool first_is_negative(const float* x, int group, float most) {
    for (int d = 0; d < group; d += 16) {
        const uint16_t below = less(magnitude(load(x + d)), set1(most));
        if (below != kAllLanes) return x[d + __builtin_ctz(~static_cast<unsigned>(below))] < 0;
    }
    return false;
}

KV_INLINE void round_codes(const float* x, int group, float inverse, float low, float high, unsigned char* codes) {
    for (int d = 0; d < group; d += 16) {
        const V c = round_even(mul(load(x + d), set1(inverse)));
        store_i8(codes + d, max(set1(low), min(set1(high), c)));
    }
}

KV_INLINE uint16_t encode_int8(const float* x, int group, float most, unsigned char* codes) {
    const uint32_t scale = up(most / 127.0f);
    round_codes(x, group, 1.0f / as_float(scale), -127.0f, 127.0f, codes);
    return static_cast<uint16_t>(scale >> 16);
}

KV_INLINE uint16_t encode_int4(const float* x, int group, float most, unsigned char* codes) {
    uint32_t scale = up(most / 8.0f);
    if (!first_is_negative(x, group, most)) scale |= 0x80000000u;
    round_codes(x, group, 1.0f / as_float(scale), -8.0f, 7.0f, codes);
    return static_cast<uint16_t>(scale >> 16);
}

// clamp(floor(y), 0, 3), without a floor.
KV_INLINE V level_of(V x, float inverse) {
    const V y = add(mul(x, set1(inverse)), set1(2.0f));
    const V upper = blend(less(y, set1(3.0f)), set1(2.0f), set1(3.0f));
    return blend(less(y, set1(1.0f)), zero(), blend(less(y, set1(2.0f)), set1(1.0f), upper));
}
KV_INLINE V int2_value(V c) { return sub(add(c, c), set1(3.0f)); }

// Sum of (x - decoded)^2 with the scale h.
KV_INLINE float int2_error(const float* x, int group, float h) {
    const float inverse = 1.0f / (2.0f * h);
    V sum = zero();
    for (int d = 0; d < group; d += 16) {
        const V v = load(x + d);
        const V e = sub(v, mul(set1(h), int2_value(level_of(v, inverse))));
        sum = add(sum, mul(e, e));
    }
    sum = add(sum, swap<1>(sum));  // a tree of neighbours, in every lane
    sum = add(sum, swap<2>(sum));
    sum = add(sum, swap<4>(sum));
    float lanes[16];
    store(lanes, add(sum, swap<8>(sum)));
    return lanes[0];
}

KV_INLINE uint16_t encode_int2(const float* x, int group, float most, unsigned char* codes) {
    constexpr float kShares[] = {1.0f, 0.9f, 0.8f, 0.7f, 0.6f, 0.5f};
    uint32_t best = 0;
    float least = 0.0f;
    for (int i = 0; i < 6; ++i) {
        const uint32_t scale = up(kShares[i] * most / 3.0f);
        const float error = int2_error(x, group, as_float(scale));
        if (i == 0 || error < least) best = scale, least = error;
    }
    const float inverse = 1.0f / (2.0f * as_float(best));
    for (int d = 0; d < group; d += 16) store_i8(codes + d, level_of(load(x + d), inverse));
    return static_cast<uint16_t>(best >> 16);
}

void encode(const float* x, int32_t dim, Format format, int32_t group, unsigned char* codes, uint16_t* scales) {
    for (int d = 0, g = 0; d < dim; d += group, ++g) {
        const float most = largest(x + d, group);
        if (!(most >= kLeast)) {
            scales[g] = most != most ? kNanBf16 : uint16_t{0};
            __builtin_memset(codes + d, 0, static_cast<unsigned long>(group));
        } else if (format == Format::int8) {
            scales[g] = encode_int8(x + d, group, most, codes + d);
        } else if (format == Format::int4) {
            scales[g] = encode_int4(x + d, group, most, codes + d);
        } else {
            scales[g] = encode_int2(x + d, group, most, codes + d);
        }
    }
}

void decode(const unsigned char* codes, const uint16_t* scales, int32_t dim, Format format, int32_t group, float* x) {
    for (int d = 0, g = 0; d < dim; d += group, ++g) {
        const V scale = set1(as_float(static_cast<uint32_t>(scales[g]) << 16));
        for (int i = d; i < d + group; i += 16) {
            const V c = load_i8(codes + i);
            store(x + i, mul(scale, format == Format::int2 ? int2_value(c) : c));
        }
    }
}

}  // namespace

void fill_encode(Kernels* table) {
    table->encode = encode;
    table->decode = decode;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_encode(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
