// Pages on their way through shared memory: a ring of units, K and V of each page of a walker in turn, several under way while
// one is read.
#pragma once

#include "cuda/attend_masks.cuh"
#include "cuda/device/copy.cuh"

namespace kvstrata::cuda {

inline constexpr int kMostUnits = 8;  // of a ring

// copy_async_wait of a number known at run time, below kMostUnits - 1.
__device__ inline void wait_for_all_but(int pending) {
    switch (pending) {
        case 0: return copy_async_wait<0>();
        case 1: return copy_async_wait<1>();
        case 2: return copy_async_wait<2>();
        case 3: return copy_async_wait<3>();
        case 4: return copy_async_wait<4>();
        case 5: return copy_async_wait<5>();
        default: return copy_async_wait<6>();
    }
}

template <class S>
class Ring {
  public:
    // Pages first, first + kWalkers, ... of the list of `entries`; the walker's threads make it together.
    __device__ Ring(unsigned char* memory, int bytes, const Staged& how, const Entries<S>& entries, int first)
        : memory_(memory),
          how_(how),
          entries_(entries),
          slots_(min(bytes / how.bytes, kMostUnits)),
          thread_(static_cast<int>(threadIdx.x) % S::kWalkerThreads),
          next_(first) {
        for (int i = 1; i < slots_; ++i) stage();
    }

    // The next unit, which stays until the next call.
    __device__ const unsigned char* take() {
        if (slots_ == 1) {
            barrier();
            stage();
            copy_async_wait<0>();
            barrier();
            return memory_;
        }
        wait_for_all_but(slots_ - 2);
        barrier();  // closes the wait of every thread, and its reading of the unit before
        stage();
        const unsigned char* const unit = memory_ + taken_ * how_.bytes;
        taken_ = taken_ + 1 == slots_ ? 0 : taken_ + 1;
        return unit;
    }

  private:
    __device__ static void barrier() {
        if constexpr (S::kTeam) {
            __syncthreads();
        } else {
            __syncwarp();
        }
    }

    // Sets out for the unit after the last, if there is one, in a group of its own.
    __device__ void stage() {
        if (next_ < entries_.count) {
            const unsigned char* const page = entries_.pages[entries_.list[next_]];
            unsigned char* const to = memory_ + staged_ * how_.bytes;
            value_ ? stage_values(to, page) : stage_keys(to, page);
            if (value_) next_ += S::kWalkers;
            value_ = !value_;
            staged_ = staged_ + 1 == slots_ ? 0 : staged_ + 1;
        }
        copy_async_commit();
    }
    __device__ void stage_keys(unsigned char* to, const unsigned char* page) const {
        for (int i = thread_; i < how_.key_chunks; i += S::kWalkerThreads)
            copy_async16(to + swizzled(i) * 16, page + i * 16);
        stage_scales(to + how_.key_scales, page + how_.k_scales_at);
    }
    __device__ void stage_values(unsigned char* to, const unsigned char* page) const {
        const int pad = how_.value_stride - how_.line_chunks * 16;
        for (int i = thread_; i < how_.value_lines * how_.line_chunks; i += S::kWalkerThreads) {
            const int line = static_cast<int>(static_cast<uint32_t>(i) * how_.line_inverse >> 22);
            copy_async16(to + i * 16 + line * pad, page + how_.v + i * 16);
        }
        stage_scales(to + how_.value_scales, page + how_.v_scales_at);
    }
    __device__ void stage_scales(unsigned char* to, const unsigned char* from) const {
        for (int i = thread_; i < how_.scale_chunks; i += S::kWalkerThreads) copy_async16(to + i * 16, from + i * 16);
    }

    unsigned char* const memory_;
    const Staged& how_;
    const Entries<S>& entries_;
    const int slots_, thread_;
    int next_;                    // in the list: the page of the unit to set out for,
    bool value_ = false;          // and whether that is its V
    int staged_ = 0, taken_ = 0;  // slots of the units to set out for and to take
};

}  // namespace kvstrata::cuda
