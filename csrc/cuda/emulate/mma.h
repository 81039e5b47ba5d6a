// Matrix products of a warp. Each lane's registers go to their places in A and B, by the element numbers of the PTX ISA
// (device/mma.cuh says the same by registers), then plain loops.
#pragma once

#include <cstring>

#include "cuda/emulate/emulate.h"

namespace kvstrata::cuda::emulate {

struct Bf16 {
    using Element = uint16_t;
    using Number = float;
    static float a(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
    static float b(uint16_t bits) { return a(bits); }
    static float add(float sum, float x, float y) { return fmaf(x, y, sum); }
};
struct F16 {
    using Element = uint16_t;
    using Number = float;
    static float a(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
    static float b(uint16_t bits) { return a(bits); }
    static float add(float sum, float x, float y) { return fmaf(x, y, sum); }
};
template <class OfA>  // int8_t or uint8_t; B is signed
struct Int8 {
    using Element = uint8_t;
    using Number = int32_t;
    static int32_t a(uint8_t bits) { return static_cast<OfA>(bits); }
    static int32_t b(uint8_t bits) { return static_cast<int8_t>(bits); }
    static int32_t add(int32_t sum, int32_t x, int32_t y) {
        return static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(x * y));
    }
};

template <class Type, int RegistersA>
struct Fragments {
    typename Type::Number d[4];
    uint32_t a[RegistersA];
    uint32_t b[RegistersA / 2];

    static void multiply(void* const* slots, unsigned mask);
};

template <class Type, int RegistersA>
void Fragments<Type, RegistersA>::multiply(void* const* slots, unsigned mask) {
    using Element = typename Type::Element;
    constexpr int kEach = 4 / sizeof(Element);                 // elements in a register
    constexpr int kOfA = RegistersA * kEach, kOfB = kOfA / 2;  // elements of a lane
    constexpr int kDepth = kOfA * 2;                           // K
    if (mask != 0xFFFFFFFFu) fault("mma", "all 32 lanes of the warp must take part");
    typename Type::Number rows[16][kDepth], columns[8][kDepth];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* own = static_cast<const Fragments*>(slots[lane]);
        const int g = lane / 4, t = lane % 4;
        Element a[kOfA], b[kOfB];
        std::memcpy(a, own->a, sizeof a);
        std::memcpy(b, own->b, sizeof b);
        for (int i = 0; i < kOfA; ++i) {  // registers alternate between row g and row g + 8, then k goes on
            const int row = i / kEach % 2 == 0 ? g : g + 8, k = t * kEach + i % kEach + (i < 2 * kEach ? 0 : 4 * kEach);
            rows[row][k] = Type::a(a[i]);
        }
        for (int i = 0; i < kOfB; ++i) {
            const int k = t * kEach + i % kEach + (i < kEach ? 0 : 4 * kEach);
            columns[g][k] = Type::b(b[i]);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto* own = static_cast<Fragments*>(slots[lane]);
        for (int i = 0; i < 4; ++i) {
            const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + i % 2;
            auto sum = own->d[i];
            for (int k = 0; k < kDepth; ++k) sum = Type::add(sum, rows[row][k], columns[column][k]);
            own->d[i] = sum;
        }
    }
}

template <class Type, int RegistersA>
void mma(const char* name, typename Type::Number (&d)[4], const uint32_t (&a)[RegistersA],
         const uint32_t (&b)[RegistersA / 2], Place place = Place::current()) {
    Fragments<Type, RegistersA> own;
    std::memcpy(own.d, d, sizeof d);
    std::memcpy(own.a, a, sizeof a);
    std::memcpy(own.b, b, sizeof b);
    warp_collective(name, 0xFFFFFFFFu, &own, Fragments<Type, RegistersA>::multiply, place);
    std::memcpy(d, own.d, sizeof d);
}

}  // namespace kvstrata::cuda::emulate
