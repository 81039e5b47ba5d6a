// Bounds of keys by channel, and sixteen pages' bounds against query heads.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

constexpr uint32_t kMagnitude = 0x7FFFFFFFu;

void turn_keys(const float* k, int32_t dim, float* rows) {
    float turned[kSlots][16];
    const void* from[16];
    for (int d = 0; d < dim; d += 16) {
        for (int i = 0; i < 16; ++i) from[i] = k + (d + i) * kSlots;
        transpose(from, 0, turned);
        for (int slot = 0; slot < kSlots; ++slot) store(rows + slot * dim + d, load(turned[slot]));
    }
}

bool stretch(float* lo, float* hi, const float* x, int32_t n) {
    const V inf = set1(__builtin_inff());
    uint16_t finite = 0xFFFF;
    for (int i = 0; i < n; i += 16) {
        const V now = load(x + i);
        store(lo + i, min(now, load(lo + i)));
        store(hi + i, max(now, load(hi + i)));
        finite &= less(bits_and(now, kMagnitude), inf);
    }
    return finite == 0xFFFF;
}

}  // namespace

void fill_bounds(Kernels* table) {
    table->turn_keys = turn_keys;
    table->stretch = stretch;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_bounds(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
