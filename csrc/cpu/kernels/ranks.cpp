// Passes over the stored tokens of a row: which of them may take another state, how they rank, who is above a threshold.
//
// Plain loops that the compiler turns into the level's vectors; what they write lies apart from what they read, for bytes
// may else alias anything.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS

namespace kvstrata::cpu::KV_ISA {
namespace {

void movable_states(const uint8_t* __restrict now, const int32_t* __restrict positions,
                    const uint8_t* __restrict protect, int32_t n, uint8_t* __restrict movable,
                    uint8_t* __restrict out) {
    for (int32_t i = 0; i < n; ++i) {
        const uint8_t state = positions[i] < 0 ? 0 : now[i];
        out[i] = state;
        movable[i] = protect[i] ? 0 : state;
    }
}

void rank_keys(const float* __restrict score, const int32_t* __restrict positions, int32_t n,
               uint64_t* __restrict keys) {
    for (int32_t i = 0; i < n; ++i) {
        uint32_t bits = __builtin_bit_cast(uint32_t, score[i]);
        bits = (bits & 0x7F800000u) == 0x7F800000u ? 0xFF800000u : bits;  // NaN and inf rank as -inf
        bits = bits == 0x80000000u ? 0 : bits;                            // -0 is 0
        const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        keys[i] = static_cast<uint64_t>(ordered) << 32 | (0x7FFFFFFFu - static_cast<uint32_t>(positions[i]));
    }
}

void mark_ranked(const uint64_t* __restrict keys, int32_t n, uint64_t least, uint8_t k, uint8_t* __restrict kind,
                 uint8_t* __restrict out) {
    for (int32_t i = 0; i < n; ++i) {  // by masks: ranks have no pattern that a branch could learn
        const uint8_t mine = static_cast<uint8_t>(-(kind[i] == k));
        const uint8_t yes = static_cast<uint8_t>(mine & -(keys[i] >= least));
        out[i] = static_cast<uint8_t>((out[i] & ~mine) | (k & yes));
        kind[i] &= static_cast<uint8_t>(~yes);
    }
}

}  // namespace

void fill_ranks(Kernels* table) {
    table->movable_states = movable_states;
    table->rank_keys = rank_keys;
    table->mark_ranked = mark_ranked;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_ranks(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
