// What window queries saw of a page: moments over the queries, from e = exp(z - m) [queries, 16] of one head.
//
// Moments are taken of differences to the first query, so equal queries vary by exactly nothing.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "cpu/kernels/math.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

// Shares A = factor * e become differences to the first query's, x; sums of A, x and A^2.
KV_INLINE void to_moves(float* e, const float* factor, int queries, V& sum, V& moves, V& squares) {
    const V first = mul(load(e), set1(factor[0]));
    sum = first, moves = zero(), squares = mul(first, first);
    store(e, zero());
    for (int t = 1; t < queries; ++t) {
        const V a = mul(load(e + t * kSlots), set1(factor[t])), x = sub(a, first);
        sum = fma(load(e + t * kSlots), set1(factor[t]), sum);
        store(e + t * kSlots, x);
        moves = add(moves, x);
        squares = fma(a, a, squares);
    }
}

// Sums over the queries of the second and fourth powers of x - mean.
template <bool Fourth>
KV_INLINE void powers(const float* x, int queries, V mean, V& second, V& fourth) {
    second = zero(), fourth = zero();
    for (int t = 0; t < queries; ++t) {
        const V moved = sub(load(x + t * kSlots), mean), square = mul(moved, moved);
        second = add(second, square);
        if constexpr (Fourth) fourth = fma(square, square, fourth);
    }
}

void share_moments(float* e, const float* factor, int32_t queries, uint16_t slots, float* mean, float* variance) {
    const V count = set1(static_cast<float>(queries));
    V sum = zero(), moves, squares, second, fourth;
    if (!variance) {
        for (int t = 0; t < queries; ++t) sum = fma(load(e + t * kSlots), set1(factor[t]), sum);
        return store(mean, blend(slots, div(sum, count), zero()));
    }
    to_moves(e, factor, queries, sum, moves, squares);
    powers<false>(e, queries, div(moves, count), second, fourth);
    store(mean, blend(slots, div(sum, count), zero()));
    const V unbiased = div(second, set1(static_cast<float>(queries - 1)));
    store(variance, queries > 1 ? blend(slots, unbiased, zero()) : zero());
}

KV_INLINE void add_to(float* lanes, V x) { store(lanes, add(load(lanes), x)); }

void sound_sums(float* e, const float* factor, int32_t queries, float* sums) {
    const V count = set1(static_cast<float>(queries));
    V sum, moves, squares, second, fourth;
    to_moves(e, factor, queries, sum, moves, squares);
    powers<true>(e, queries, div(moves, count), second, fourth);
    second = div(second, count), fourth = div(fourth, count);
    add_to(sums, div(squares, count));
    add_to(sums + kSlots, second);
    add_to(sums + 2 * kSlots, blend(differ(second, zero()), div(fourth, second), zero()));
}

void code_sums(float* e, const float* factor, int32_t queries, uint16_t slots, float* sums) {
    const V count = set1(static_cast<float>(queries));
    V sum, moves, squares, second, fourth;
    for (int t = 0; t < queries; ++t) store(e + t * kSlots, blend(slots, load(e + t * kSlots), zero()));
    to_moves(e, factor, queries, sum, moves, squares);
    powers<true>(e, queries, div(moves, count), second, fourth);
    if (queries > 1) add_to(sums, div(second, set1(static_cast<float>(queries - 1))));
    const V bounded = max(set1(1e-8f), div(second, count));  // the second operand, where it is NaN
    add_to(sums + kSlots, div(div(fourth, count), mul(bounded, bounded)));
}

constexpr int kMosts = 4;  // maxima at a time: one alone would wait for itself

// The second operand of max stays where it is NaN; the first is to be seen, too.
KV_INLINE void raise(V& top, const float* z, float lse, uint16_t& nan) {
    const V x = sub(load(z), set1(lse));
    nan |= differ(x, x);
    top = max(x, top);
}

void raise_most(const float* z, const float* lse, int32_t n, float* most) {
    V tops[kMosts];
    for (V& top : tops) top = load(most);
    uint16_t nan = 0;
    int32_t i = 0;
    for (; i + kMosts <= n; i += kMosts) {
        for (int k = 0; k < kMosts; ++k) raise(tops[k], z + (i + k) * kSlots, lse[i + k], nan);
    }
    for (; i < n; ++i) raise(tops[0], z + i * kSlots, lse[i], nan);
    const V top = max(max(tops[3], tops[2]), max(tops[1], tops[0]));
    store(most, blend(nan, set1(__builtin_nanf("")), top));
}

void exp_slots(float* x, uint16_t slots) { store(x, blend(slots, exp(load(x)), zero())); }

}  // namespace

void fill_scores(Kernels* table) {
    table->share_moments = share_moments;
    table->sound_sums = sound_sums;
    table->code_sums = code_sums;
    table->raise_most = raise_most;
    table->exp_slots = exp_slots;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_scores(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
