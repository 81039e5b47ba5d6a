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
    __device__ __forceinline__ Ring(unsigned char* memory, int bytes, const Staged& how, const Entries<S>& entries,
                                    int first)
        : memory_(memory),
          how_(how),
          entries_(entries),
          slots_(min(bytes / how.bytes, kMostUnits)),
          thread_(static_cast<int>(threadIdx.x) % S::kWalkerThreads),
          key_to_(swizzled(thread_, how.swizzle) * 16),
          value_to_(thread_ * 16 + thread_ / how.line_chunks * pad()),
          next_(first) {
        for (int i = 1; i < slots_; ++i) stage();
    }

    // The next unit, which stays until the next call.
    __device__ __forceinline__ const unsigned char* take() {
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
    static constexpr int kStep = S::kWalkerThreads;  // chunks from one of a thread's to its next

    __device__ static void barrier() {
        if constexpr (S::kTeam) {
            __syncthreads();
        } else {
            __syncwarp();
        }
    }
    __device__ int pad() const { return how_.value_stride - how_.line_chunks * 16; }

    // Sets out for the unit after the last, if there is one, in a group of its own.
    __device__ __forceinline__ void stage() {
        if (next_ < entries_.count) {
            const unsigned char* const page = entries_.pages[entries_.list[next_]];
            unsigned char* const unit = memory_ + staged_ * how_.bytes;
            value_ ? stage_values(unit + value_to_, page + how_.values_in_page + thread_ * 16)
                   : stage_keys(unit + key_to_, page + thread_ * 16);
            const unsigned char* const from = page + (value_ ? how_.value_scales_in_page : how_.key_scales_in_page);
            unsigned char* const to = unit + (value_ ? how_.value_scales : how_.key_scales);
#pragma unroll(S::kExact ? 64 : 1)
            for (int i = 0; i < how_.scale_chunks; i += kStep)
                if (i + thread_ < how_.scale_chunks) copy_async16(to + (i + thread_) * 16, from + (i + thread_) * 16);
            if (value_) next_ += S::kWalkers;
            value_ = !value_;
            staged_ = staged_ + 1 == slots_ ? 0 : staged_ + 1;
        }
        copy_async_commit();
    }

    // From the thread's first chunk on. A step does not reach the bits of K that are swizzled.
    __device__ __forceinline__ void stage_keys(unsigned char* to, const unsigned char* from) const {
#pragma unroll(S::kExact ? 64 : 2)
        for (int i = 0; i < how_.key_chunks; i += kStep)
            if (i + thread_ < how_.key_chunks) copy_async16(to + i * 16, from + i * 16);
    }
    __device__ __forceinline__ void stage_values(unsigned char* to, const unsigned char* from) const {
        const int chunks = how_.value_lines * how_.line_chunks;
        int chunk = thread_ % how_.line_chunks, at = 0;
#pragma unroll(S::kExact ? 64 : 2)
        for (int i = 0; i < chunks; i += kStep) {
            if (i + thread_ < chunks) copy_async16(to + at, from + i * 16);
            chunk += kStep % how_.line_chunks, at += kStep * 16 + kStep / how_.line_chunks * pad();
            if (chunk >= how_.line_chunks) chunk -= how_.line_chunks, at += pad();
        }
    }

    unsigned char* const memory_;
    const Staged how_;
    const Entries<S>& entries_;
    const int slots_, thread_;
    const int key_to_, value_to_;  // bytes in a unit to the thread's first chunk of K and of V
    int next_;                     // in the list: the page of the unit to set out for,
    bool value_ = false;           // and whether that is its V
    int staged_ = 0, taken_ = 0;   // slots of the units to set out for and to take
};

}  // namespace kvstrata::cuda
