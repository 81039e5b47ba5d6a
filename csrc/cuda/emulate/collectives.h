// Barriers, shuffles, votes and atomics under their CUDA names. Included by emulate.h.
#pragma once

#include <cstring>

#include "cuda/emulate/emulate.h"

namespace kvstrata::cuda::emulate {

// A collective whose slot is `S`: `Each` gets all slots of the mask and one lane, and fills that lane's slot.
template <class S, class Each>
S warp_each(const char* name, unsigned mask, S mine, Each, Place place) {
    const auto finish = [](void* const* slots, unsigned all) {
        for (int i = 0; i < warpSize; ++i)
            if (all >> i & 1u) Each{}(reinterpret_cast<S* const*>(slots), all, i);
    };
    warp_collective(name, mask, &mine, finish, place);
    return mine;
}

template <class T>
struct Shuffled {
    T in, out;
    int source;
};

template <class T>
T shuffle(const char* name, unsigned mask, T x, int source, Place place) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2);
    const auto each = [](Shuffled<T>* const* s, unsigned, int i) {
        const Shuffled<T>* from = s[s[i]->source];
        if (from != nullptr) {
            std::memcpy(&s[i]->out, &from->in, sizeof(T));
        } else {
            std::memset(static_cast<void*>(&s[i]->out), 0xFF, sizeof(T));
        }
    };
    return warp_each(name, mask, Shuffled<T>{x, x, source}, each, place).out;
}

// The lane that `offset` leads to inside this lane's segment of `width`, or this lane where it leads out of it.
inline int lane_inside(int to, int width) {
    const int first = lane() / width * width;
    return to >= first && to < first + width ? to : lane();
}

struct Vote {
    uint64_t in;
    uint64_t out;
};
template <class Each>
uint64_t vote(const char* name, unsigned mask, uint64_t x, Each each, Place place) {
    return warp_each(name, mask, Vote{x, 0}, each, place).out;
}

// Folds all values of the mask in order of lanes.
template <class T, class Fold>
T reduce(const char* name, unsigned mask, T x, Fold, Place place) {
    struct Value {
        T in, out;
    };
    const auto each = [](Value* const* s, unsigned all, int i) {
        bool first = true;
        for (int j = 0; j < warpSize; ++j) {
            if (!(all >> j & 1u)) continue;
            s[i]->out = first ? s[j]->in : Fold{}(s[i]->out, s[j]->in);
            first = false;
        }
    };
    return warp_each(name, mask, Value{x, x}, each, place).out;
}

// Sum, and, or of `x` (0 or 1) over the block.
template <class Fold>
int block_vote(const char* name, int x, Fold, Place place) {
    const auto finish = [](void* const* slots, int threads) {
        int all = *static_cast<int*>(slots[0]);
        for (int i = 1; i < threads; ++i) all = Fold{}(all, *static_cast<int*>(slots[i]));
        for (int i = 0; i < threads; ++i) *static_cast<int*>(slots[i]) = all;
    };
    block_collective(name, &x, finish, place);
    return x;
}

}  // namespace kvstrata::cuda::emulate

#define KV_PLACE ::std::source_location place = ::std::source_location::current()
#define KV_EMULATE ::kvstrata::cuda::emulate

inline void __syncthreads(KV_PLACE) {
    KV_EMULATE::block_collective("__syncthreads", nullptr, [](void* const*, int) {}, place);
}
inline int __syncthreads_or(int x, KV_PLACE) {
    return KV_EMULATE::block_vote("__syncthreads_or", x != 0, [](int a, int b) { return a | b; }, place);
}
inline int __syncthreads_and(int x, KV_PLACE) {
    return KV_EMULATE::block_vote("__syncthreads_and", x != 0, [](int a, int b) { return a & b; }, place);
}
inline int __syncthreads_count(int x, KV_PLACE) {
    return KV_EMULATE::block_vote("__syncthreads_count", x != 0, [](int a, int b) { return a + b; }, place);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, KV_PLACE) {
    KV_EMULATE::warp_collective("__syncwarp", mask, nullptr, [](void* const*, unsigned) {}, place);
}

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32, KV_PLACE) {
    const int to = KV_EMULATE::lane() / width * width + (source & (width - 1));
    return KV_EMULATE::shuffle("__shfl_sync", mask, x, to, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int other, int width = 32, KV_PLACE) {
    const int to = KV_EMULATE::lane_inside(KV_EMULATE::lane() ^ other, width);
    return KV_EMULATE::shuffle("__shfl_xor_sync", mask, x, to, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32, KV_PLACE) {
    const int to = KV_EMULATE::lane_inside(KV_EMULATE::lane() + static_cast<int>(delta), width);
    return KV_EMULATE::shuffle("__shfl_down_sync", mask, x, to, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32, KV_PLACE) {
    const int to = KV_EMULATE::lane_inside(KV_EMULATE::lane() - static_cast<int>(delta), width);
    return KV_EMULATE::shuffle("__shfl_up_sync", mask, x, to, place);
}

inline unsigned __ballot_sync(unsigned mask, int x, KV_PLACE) {
    const auto each = [](KV_EMULATE::Vote* const* s, unsigned all, int i) {
        s[i]->out = 0;
        for (int j = 0; j < 32; ++j)
            if (all >> j & 1u) s[i]->out |= s[j]->in << j;
    };
    return static_cast<unsigned>(KV_EMULATE::vote("__ballot_sync", mask, x != 0, each, place));
}
inline int __any_sync(unsigned mask, int x, KV_PLACE) { return __ballot_sync(mask, x, place) != 0; }
inline int __all_sync(unsigned mask, int x, KV_PLACE) { return __ballot_sync(mask, x == 0, place) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T x, KV_PLACE) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    const auto each = [](KV_EMULATE::Vote* const* s, unsigned all, int i) {
        s[i]->out = 0;
        for (int j = 0; j < 32; ++j)
            if (all >> j & 1u) s[i]->out |= uint64_t{s[j]->in == s[i]->in} << j;
    };
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof(T));
    return static_cast<unsigned>(KV_EMULATE::vote("__match_any_sync", mask, bits, each, place));
}

#define KV_REDUCE(name, T, fold)                                                              \
    inline T name(unsigned mask, T x, KV_PLACE) {                                             \
        return KV_EMULATE::reduce(#name, mask, x, [](T a, T b) -> T { return fold; }, place); \
    }
KV_REDUCE(__reduce_add_sync, unsigned, a + b)
KV_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
KV_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
KV_REDUCE(__reduce_min_sync, int, a < b ? a : b)
KV_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
KV_REDUCE(__reduce_max_sync, int, a > b ? a : b)
KV_REDUCE(__reduce_and_sync, unsigned, a& b)
KV_REDUCE(__reduce_or_sync, unsigned, a | b)
KV_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef KV_REDUCE

// Fibers switch at collectives only, so a plain read and write is atomic.
#define KV_ATOMIC(name, T, result)    \
    inline T name(T* at, T x) {       \
        const T old = *at;            \
        *at = static_cast<T>(result); \
        return old;                   \
    }
#define KV_ATOMICS(T)                            \
    KV_ATOMIC(atomicMax, T, old > x ? old : x)   \
    KV_ATOMIC(atomicMin, T, old < x ? old : x)   \
    KV_ATOMIC(atomicOr, T, old | x)              \
    KV_ATOMIC(atomicAnd, T, old& x)              \
    KV_ATOMIC(atomicXor, T, old ^ x)             \
    KV_ATOMIC(atomicExch, T, x)                  \
    inline T atomicCAS(T* at, T expected, T x) { \
        const T old = *at;                       \
        if (old == expected) *at = x;            \
        return old;                              \
    }
KV_ATOMICS(int)
KV_ATOMICS(unsigned)
KV_ATOMICS(unsigned long long)
KV_ATOMIC(atomicAdd, int, static_cast<unsigned>(old) + static_cast<unsigned>(x))
KV_ATOMIC(atomicAdd, unsigned, old + x)
KV_ATOMIC(atomicAdd, unsigned long long, old + x)
KV_ATOMIC(atomicSub, int, static_cast<unsigned>(old) - static_cast<unsigned>(x))
KV_ATOMIC(atomicSub, unsigned, old - x)
#undef KV_ATOMICS
#undef KV_ATOMIC

inline void __threadfence() {}
inline void __threadfence_block() {}

#undef KV_PLACE
#undef KV_EMULATE
