// The rotation of ops/rotate.h of a vector that lies across a warp: lane l holds dims l, 32 + l, 64 + l, ... in
// registers 0, 1, 2, ...; lanes past the end hold zeros.
//
// Butterflies of strides 1 to 16 are shuffles, wider ones are between registers. Every output is one sum of two numbers
// per butterfly and the mix adds in ascending order, so the bits are the CPU's.
#pragma once

#include "common/layout.h"
#include "cuda/device/warp.cuh"

namespace kvstrata::cuda {

// What the rotation of one head dimension needs: a kernel argument, made on the host.
struct Rotation {
    int32_t dim;                             // D = m * block
    int32_t block;                           // the largest power of two in D
    float norm;                              // 1 / sqrt(block), rounded once
    float share;                             // 2 / m
    uint32_t negative[kMaxHeadDim / kWarp];  // bit l of word s: s_d = -1 for d = 32 s + l
};

constexpr uint64_t splitmix64(uint64_t d) {
    uint64_t z = d + 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}
constexpr Rotation signs() {
    Rotation r{};
    for (int d = 0; d < kMaxHeadDim; ++d) {
        r.negative[d / kWarp] |= static_cast<uint32_t>(splitmix64(static_cast<uint64_t>(d)) % 2) << d % kWarp;
    }
    return r;
}
inline constexpr Rotation kSigns = signs();

inline Rotation rotation(int head_dim) {
    Rotation r = kSigns;
    r.dim = head_dim;
    r.block = head_dim & -head_dim;
    r.share = 2.0f / static_cast<float>(head_dim / r.block);
    switch (r.block) {
        case 16: r.norm = 0.25f; break;
        case 32: r.norm = 0.17677669529663688110f; break;
        case 64: r.norm = 0.125f; break;
        case 128: r.norm = 0.08838834764831844055f; break;
        case 256: r.norm = 0.0625f; break;
        default: r.norm = 0.04419417382415922028f; break;
    }
    return r;
}

// with_registers(head_dim, [&]<int N>() { return launch(...N...); }): 32 N is at least D.
template <class Work>
int with_registers(int head_dim, Work work) {
    if (head_dim <= 2 * kWarp) return work.template operator()<2>();
    if (head_dim <= 4 * kWarp) return work.template operator()<4>();
    if (head_dim <= 8 * kWarp) return work.template operator()<8>();
    return work.template operator()<kMaxHeadDim / kWarp>();
}

// Changes the sign of the dims with s_d = -1.
template <int N>
__device__ __forceinline__ void apply_signs(float (&x)[N], const Rotation& r) {
#pragma unroll
    for (int s = 0; s < N; ++s) x[s] = r.negative[s] >> lane() & 1 ? -x[s] : x[s];
}

// Walsh-Hadamard over each block, not yet scaled.
template <int N>
__device__ __forceinline__ void hadamard(float (&x)[N], const Rotation& r) {
#pragma unroll
    for (int stride = 1; stride < kWarp; stride *= 2) {
        if (stride >= r.block) break;  // blocks of 16 lie two in a register
        const bool upper = lane() & stride;
#pragma unroll
        for (int s = 0; s < N; ++s) {
            const float other = __shfl_xor_sync(kAllLanes, x[s], stride);
            x[s] = upper ? other - x[s] : x[s] + other;
        }
    }
#pragma unroll
    for (int stride = 1; stride < N; stride *= 2) {
        if (stride * kWarp >= r.block) break;
#pragma unroll
        for (int s = 0; s < N; ++s) {
            if (s & stride || s + stride >= N) continue;
            const float u = x[s], v = x[s + stride];
            x[s] = u + v;
            x[s + stride] = u - v;
        }
    }
}

// The mix of blocks of 32 * Span dims.
template <int Span, int N>
__device__ __forceinline__ void mix_registers(float (&x)[N], const Rotation& r) {
    if constexpr (Span < N) {
#pragma unroll
        for (int j = 0; j < Span; ++j) {
            float total = x[j];
#pragma unroll
            for (int s = j + Span; s < N; s += Span) total = s * kWarp < r.dim ? total + x[s] : total;
            total *= r.share;
#pragma unroll
            for (int s = j; s < N; s += Span) x[s] -= s * kWarp < r.dim ? total : 0.0f;
        }
    }
}

// Likewise of blocks of 16: one in the lower lanes, the next in the upper ones.
template <int N>
__device__ __forceinline__ void mix_halves(float (&x)[N], const Rotation& r) {
    const bool upper = lane() & 16;
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < N; ++s) {
        const float other = __shfl_xor_sync(kAllLanes, x[s], 16);
        const float first = upper ? other : x[s], second = upper ? x[s] : other;
        if (s * kWarp < r.dim) total = s ? total + first : first;
        if (s * kWarp + 16 < r.dim) total += second;
    }
    total *= r.share;
#pragma unroll
    for (int s = 0; s < N; ++s) x[s] -= s * kWarp + lane() < r.dim ? total : 0.0f;
}

template <int N>
__device__ __forceinline__ void mix(float (&x)[N], const Rotation& r) {
    if (r.block == r.dim) return;
    switch (r.block) {
        case 16: return mix_halves(x, r);
        case 32: return mix_registers<1>(x, r);
        case 64: return mix_registers<2>(x, r);
        default: return mix_registers<4>(x, r);  // 128: m is at least 3
    }
}

template <int N>
__device__ __forceinline__ void multiply(float (&x)[N], float factor) {
#pragma unroll
    for (int s = 0; s < N; ++s) x[s] *= factor;
}

// x' = R x, or back. All lanes of the warp take part.
template <int N>
__device__ __forceinline__ void rotate(float (&x)[N], const Rotation& r, bool inverse) {
    if (inverse) {
        mix(x, r);
        hadamard(x, r);
        multiply(x, r.norm);
        apply_signs(x, r);
    } else {
        apply_signs(x, r);
        hadamard(x, r);
        multiply(x, r.norm);
        mix(x, r);
    }
}

}  // namespace kvstrata::cuda
