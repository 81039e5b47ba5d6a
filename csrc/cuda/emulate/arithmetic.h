// CUDA's bit and number functions under their names. Included by emulate.h.
#pragma once

#include <cuda_fp16.h>
#include <math.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#define KV_BOTH(T)                                   \
    inline T min(T a, T b) { return b < a ? b : a; } \
    inline T max(T a, T b) { return a < b ? b : a; }
KV_BOTH(int)
KV_BOTH(unsigned)
KV_BOTH(long)
KV_BOTH(unsigned long)
KV_BOTH(long long)
KV_BOTH(unsigned long long)
#undef KV_BOTH
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
    return y;
}
inline unsigned long long __brevll(unsigned long long x) {
    const auto low = static_cast<unsigned>(x), high = static_cast<unsigned>(x >> 32);
    return static_cast<unsigned long long>(__brev(low)) << 32 | __brev(high);
}
// Byte i of the result is byte s_i of (y, x), or its sign where bit 3 of s_i is set.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = s >> (4 * i) & 15u, byte = both >> (8 * (pick & 7u)) & 255u;
        out |= (pick & 8u ? (byte & 128u ? 255u : 0u) : byte) << (8 * i);
    }
    return out;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (n & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (n & 31u));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __dp4a(int a, int b, int c) {
    auto sum = static_cast<unsigned>(c);
    for (int i = 0; i < 32; i += 8)
        sum += static_cast<unsigned>(static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i));
    return static_cast<int>(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 255u) * (b >> i & 255u);
    return c;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

namespace kvstrata::cuda::emulate {
// `x` is integral; out of range it saturates, NaN is 0, as on the device.
template <class T>
T saturate(float x) {
    constexpr float kEnd = sizeof(T) == 8 ? 0x1p63f : T(-1) < T(0) ? 0x1p31f : 0x1p32f;
    if (std::isnan(x)) return 0;
    if (T(-1) > T(0) && x <= 0.0f) return 0;
    if (x >= kEnd) return T(-1) > T(0) ? T(-1) : static_cast<T>((1ull << (8 * sizeof(T) - 1)) - 1);
    if (x < -kEnd) return static_cast<T>(1ull << (8 * sizeof(T) - 1));
    return static_cast<T>(x);
}
}  // namespace kvstrata::cuda::emulate
inline int __float2int_rn(float x) { return kvstrata::cuda::emulate::saturate<int>(rintf(x)); }
inline int __float2int_rd(float x) { return kvstrata::cuda::emulate::saturate<int>(floorf(x)); }
inline int __float2int_ru(float x) { return kvstrata::cuda::emulate::saturate<int>(ceilf(x)); }
inline int __float2int_rz(float x) { return kvstrata::cuda::emulate::saturate<int>(truncf(x)); }
inline unsigned __float2uint_rn(float x) { return kvstrata::cuda::emulate::saturate<unsigned>(rintf(x)); }
inline unsigned __float2uint_rd(float x) { return kvstrata::cuda::emulate::saturate<unsigned>(floorf(x)); }
inline unsigned __float2uint_rz(float x) { return kvstrata::cuda::emulate::saturate<unsigned>(truncf(x)); }
inline long long __float2ll_rn(float x) { return kvstrata::cuda::emulate::saturate<long long>(rintf(x)); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }  // NaN: 0

// Exact in double; the headers have the other half arithmetic on the CPU too.
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    const double low = static_cast<double>(__low2float(a)) * __low2float(b) + __low2float(c);
    const double high = static_cast<double>(__high2float(a)) * __high2float(b) + __high2float(c);
    return __halves2half2(__double2half(low), __double2half(high));
}

template <class T>
T __ldg(const T* at) {
    return *at;
}
template <class T>
T __ldcs(const T* at) {
    return *at;
}
template <class T>
T __ldcg(const T* at) {
    return *at;
}
template <class T>
void __stcs(T* at, T x) {
    *at = x;
}
template <class T>
void __stcg(T* at, T x) {
    *at = x;
}
inline void __trap() { std::abort(); }
