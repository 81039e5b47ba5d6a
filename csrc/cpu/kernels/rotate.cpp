// The rotation of ops/rotate.h, over the dimensions of one vector. Every output is one sum of two numbers per butterfly,
// so the order of additions is the formula's own at any width.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "common/layout.h"
#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

struct Signs {
    float at[kMaxHeadDim];
};
constexpr uint64_t splitmix64(uint64_t d) {
    uint64_t z = d + 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}
constexpr Signs make_signs() {
    Signs signs{};
    for (int d = 0; d < kMaxHeadDim; ++d) signs.at[d] = splitmix64(static_cast<uint64_t>(d)) % 2 ? -1.0f : 1.0f;
    return signs;
}
constexpr Signs kSigns = make_signs();

// 1 / sqrt(block), rounded once to f32; block is a power of two in 16..512.
KV_INLINE float norm_of(int block) {
    switch (block) {
        case 16: return 0.25f;
        case 32: return 0.17677669529663688110f;
        case 64: return 0.125f;
        case 128: return 0.08838834764831844055f;
        case 256: return 0.0625f;
        default: return 0.04419417382415922028f;
    }
}

// Lane i gets u + v where it is the lower of its pair, u - v where it is the upper.
template <int Stride>
KV_INLINE V butterfly(V x) {
    constexpr uint16_t kUpper = Stride == 1 ? 0xAAAA : Stride == 2 ? 0xCCCC : Stride == 4 ? 0xF0F0 : 0xFF00;
    return add(swap<Stride>(x), negate(kUpper, x));
}

// Walsh-Hadamard over each block, not yet scaled; `signs` multiply first.
KV_INLINE void hadamard(float* x, int dim, int block, const float* signs) {
    for (int d = 0; d < dim; d += 16) {
        V v = load(x + d);
        if (signs) v = mul(v, load(signs + d));
        v = butterfly<1>(v);
        v = butterfly<2>(v);
        v = butterfly<4>(v);
        store(x + d, butterfly<8>(v));
    }
    for (int stride = 16; stride < block; stride *= 2) {
        for (int first = 0; first < dim; first += 2 * stride) {
            for (int d = first; d < first + stride; d += 16) {
                const V u = load(x + d), v = load(x + d + stride);
                store(x + d, add(u, v));
                store(x + d + stride, sub(u, v));
            }
        }
    }
}

KV_INLINE void mix(float* x, int dim, int block) {
    if (dim == block) return;
    const V share = set1(2.0f / static_cast<float>(dim / block));
    for (int j = 0; j < block; j += 16) {
        V total = load(x + j);
        for (int d = j + block; d < dim; d += block) total = add(total, load(x + d));
        total = mul(total, share);
        for (int d = j; d < dim; d += block) store(x + d, sub(load(x + d), total));
    }
}

void rotate(float* x, int32_t dim, bool inverse) {
    const int block = dim & -dim;
    const V norm = set1(norm_of(block));
    if (inverse) {
        mix(x, dim, block);
        hadamard(x, dim, block, nullptr);
        for (int d = 0; d < dim; d += 16) store(x + d, mul(mul(load(x + d), norm), load(kSigns.at + d)));
    } else {
        hadamard(x, dim, block, kSigns.at);
        for (int d = 0; d < dim; d += 16) store(x + d, mul(load(x + d), norm));
        mix(x, dim, block);
    }
}

}  // namespace

void fill_rotate(Kernels* table) { table->rotate = rotate; }

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_rotate(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
