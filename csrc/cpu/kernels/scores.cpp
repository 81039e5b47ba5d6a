// What window queries saw of a page: log-sum-exps and moments over the queries, from finished logits z [queries, 16].
//
// Moments are taken of differences to the first query, so equal queries vary by exactly nothing.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "cpu/kernels/math.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr float kNothing = -__builtin_inff();

// attend's online softmax without the values.
void soften_rows(const float* z, int32_t rows, float* maximum, float* sum) {
    for (int row = 0; row < rows; ++row) {
        const V x = load(z + row * kSlots);
        if (!differ(x, set1(kNothing))) continue;  // nothing read; NaN counts as something
        V total = load(sum + row * kSlots);
        if (less(set1(maximum[row]), x)) {
            const float now = max_lane(x);
            total = mul(total, exp(set1(maximum[row] - now)));
            maximum[row] = now;
        }
        store(sum + row * kSlots, add(total, exp(sub(x, set1(maximum[row])))));
    }
}

// exp(z - lse) + `log_factor` in the exponent, and 0 where z is -inf whatever lse is.
KV_INLINE V share(V z, float lse, float log_factor) {
    return blend(differ(z, set1(kNothing)), exp(add(sub(z, set1(lse)), set1(log_factor))), zero());
}

// Mean of x [queries, 16] less its first line.
KV_INLINE V mean_move(const float* x, int queries) {
    const V first = load(x);
    V sum = zero();
    for (int t = 1; t < queries; ++t) sum = add(sum, sub(load(x + t * kSlots), first));
    return div(sum, set1(static_cast<float>(queries)));
}

// Sums over the queries of the second and fourth powers of x - mean.
KV_INLINE void powers(const float* x, int queries, V& second, V& fourth) {
    const V first = load(x), mean = mean_move(x, queries);
    second = zero(), fourth = zero();
    for (int t = 0; t < queries; ++t) {
        const V moved = sub(sub(load(x + t * kSlots), first), mean), square = mul(moved, moved);
        second = add(second, square);
        fourth = add(fourth, mul(square, square));
    }
}

void share_moments(float* z, const float* lse, int32_t queries, float* mean, float* variance) {
    V sum = zero(), second, fourth;
    for (int t = 0; t < queries; ++t) {
        const V a = share(load(z + t * kSlots), lse[t], 0.0f);
        store(z + t * kSlots, a);
        sum = add(sum, a);
    }
    store(mean, div(sum, set1(static_cast<float>(queries))));
    if (!variance) return;
    powers(z, queries, second, fourth);
    store(variance, queries > 1 ? div(second, set1(static_cast<float>(queries - 1))) : zero());
}

KV_INLINE void add_to(float* lanes, V x) { store(lanes, add(load(lanes), x)); }

void sound_sums(float* z, const float* lse, float log_n, int32_t queries, float* sums) {
    const V count = set1(static_cast<float>(queries));
    V energy = zero(), entropy = zero(), second, fourth;
    for (int t = 0; t < queries; ++t) {
        const V x = load(z + t * kSlots), p = share(x, lse[t], log_n);
        store(z + t * kSlots, p);
        energy = add(energy, mul(p, p));
        entropy = add(entropy, blend(differ(x, set1(kNothing)), mul(p, sub(x, set1(lse[t]))), zero()));
    }
    powers(z, queries, second, fourth);
    second = div(second, count), fourth = div(fourth, count);
    add_to(sums, entropy);
    add_to(sums + kSlots, div(energy, count));
    add_to(sums + 2 * kSlots, second);
    const V ratio = div(fourth, second);
    add_to(sums + 3 * kSlots, blend(differ(second, zero()), ratio, zero()));
}

void code_sums(float* z, const float* lse, int32_t queries, float* sums) {
    const V count = set1(static_cast<float>(queries));
    V second, fourth;
    for (int t = 0; t < queries; ++t) store(z + t * kSlots, share(load(z + t * kSlots), lse[t], 0.0f));
    powers(z, queries, second, fourth);
    if (queries > 1) add_to(sums, div(second, set1(static_cast<float>(queries - 1))));
    const V bounded = max(set1(1e-8f), div(second, count));  // the second operand, where it is NaN
    add_to(sums + kSlots, div(div(fourth, count), mul(bounded, bounded)));
}

}  // namespace

void fill_scores(Kernels* table) {
    table->soften_rows = soften_rows;
    table->share_moments = share_moments;
    table->sound_sums = sound_sums;
    table->code_sums = code_sums;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_scores(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
