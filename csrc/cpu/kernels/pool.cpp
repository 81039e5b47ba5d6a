// Pooled scores of tokens in order of position, whose neighbours are a few tokens before and after each.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

// Lanes that have a neighbour at this distance, of those with so many.
KV_INLINE uint16_t reaching(int distance, V neighbours) {
    return less(set1(static_cast<float>(distance) - 0.5f), neighbours);
}

KV_INLINE V larger(uint16_t lanes, V x, V most) {  // a NaN wins and stays
    return blend(static_cast<uint16_t>(lanes & (less(most, x) | differ(x, x))), x, most);
}

void pool_max(const float* values, const float* before, const float* after, int32_t n, int32_t reach, float* sums) {
    for (int i = 0; i < n; i += 16) {
        const V b = load(before + i), a = load(after + i);
        V most = load(values + i);
        for (int o = 1; o <= reach; ++o) {
            most = larger(reaching(o, b), load(values + i - o), most);
            most = larger(reaching(o, a), load(values + i + o), most);
        }
        store(sums + i, add(load(sums + i), most));
    }
}

void pool_average(const float* values, const float* before, const float* after, int32_t n, int32_t reach, float divisor,
                  float* sums) {
    for (int i = 0; i < n; i += 16) {
        const V b = load(before + i), a = load(after + i);
        V total = zero();
        for (int o = reach; o > 0; --o) total = add(total, blend(reaching(o, b), load(values + i - o), zero()));
        total = add(total, load(values + i));
        for (int o = 1; o <= reach; ++o) total = add(total, blend(reaching(o, a), load(values + i + o), zero()));
        const V present = add(add(b, a), set1(1.0f));
        store(sums + i, add(load(sums + i), div(total, divisor > 0.0f ? set1(divisor) : present)));
    }
}

}  // namespace

void fill_pool(Kernels* table) {
    table->pool_max = pool_max;
    table->pool_average = pool_average;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_pool(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
