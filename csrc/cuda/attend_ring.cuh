// Pages on their way through shared memory: a ring of one, two or four, and K and V of each move for themselves, so that 1, 3 or 7
// halves are under way while one is read.
#pragma once

#include "cuda/attend_masks.cuh"
#include "cuda/device/copy.cuh"

namespace kvstrata::cuda {

// Pages of a ring in which so many have room: 4, 2, or 1.
constexpr int ring_pages(int room) { return room >= 4 ? 4 : room >= 2 ? 2 : 1; }

template <class S>
class Ring {
  public:
    // Pages first, first + kWalkers, ... of the list of `entries`; the walker's threads make it together, and take together.
    __device__ __forceinline__ Ring(unsigned char* memory, int bytes, const Staged& how, const Entries<S>& entries,
                                    int first)
        : memory_(memory),
          how_(how),
          entries_(entries),
          pages_(ring_pages(bytes / how.bytes)),
          thread_(static_cast<int>(threadIdx.x) % S::kWalkerThreads),
          next_(first) {
        find_page();
        stage_keys(memory_);
        for (int i = 1; i < pages_; ++i) {
            stage_values(memory_ + (i - 1) * how_.bytes);
            find_page();
            stage_keys(memory_ + i * how_.bytes);
        }
    }

    // Of the next page: K, and then V. Each stays until the other is taken.
    __device__ __forceinline__ const unsigned char* take_keys() {
        wait();
        const int before = taken_ ? taken_ - 1 : pages_ - 1;
        stage_values(memory_ + before * how_.bytes);
        return memory_ + taken_ * how_.bytes;
    }
    __device__ __forceinline__ const unsigned char* take_values() {
        wait();
        unsigned char* const page = memory_ + taken_ * how_.bytes;
        find_page();
        stage_keys(page);
        taken_ = taken_ + 1 == pages_ ? 0 : taken_ + 1;
        return page;
    }

  private:
    static constexpr int kStep = S::kWalkerThreads;  // chunks from one of a thread's to its next

    // For the oldest half under way; every thread has read the one before it then.
    __device__ __forceinline__ void wait() const {
        if (pages_ == 4) {
            copy_async_wait<6>();
        } else if (pages_ == 2) {
            copy_async_wait<2>();
        } else {
            copy_async_wait<0>();
        }
        if constexpr (S::kTeam) {
            __syncthreads();
        } else {
            __syncwarp();
        }
    }

    // The page to set out for, null behind the last.
    __device__ __forceinline__ void find_page() {
        page_ = next_ < entries_.count ? entries_.pages[entries_.list[next_]] : nullptr;
        next_ += S::kWalkers;
    }

    // A half sets out, in a group of its own, empty behind the last. A step does not reach the bits of K that are swizzled.
    __device__ __forceinline__ void stage_keys(unsigned char* to) const {
        if (page_) {
            const unsigned char* const from = page_ + thread_ * 16;
            unsigned char* const own = to + swizzled(thread_, how_.swizzle) * 16;
#pragma unroll(S::kExact ? 64 : 2)
            for (int i = 0; i < how_.key_chunks; i += kStep)
                if (i + thread_ < how_.key_chunks) copy_async16(own + i * 16, from + i * 16);
            stage_scales(to + how_.key_scales, page_ + how_.key_scales_in_page);
        }
        copy_async_commit();
    }
    __device__ __forceinline__ void stage_values(unsigned char* to) const {
        if (page_) {
            const int chunks = how_.value_lines * how_.line_chunks, pad = how_.value_stride - how_.line_chunks * 16;
            const unsigned char* const from = page_ + how_.values_in_page + thread_ * 16;
            unsigned char* own = to + how_.values + thread_ * 16 + thread_ / how_.line_chunks * pad;
            int chunk = thread_ % how_.line_chunks;
#pragma unroll(S::kExact ? 64 : 2)
            for (int i = 0; i < chunks; i += kStep) {
                if (i + thread_ < chunks) copy_async16(own, from + i * 16);
                chunk += kStep % how_.line_chunks, own += kStep * 16 + kStep / how_.line_chunks * pad;
                if (chunk >= how_.line_chunks) chunk -= how_.line_chunks, own += pad;
            }
            stage_scales(to + how_.value_scales, page_ + how_.value_scales_in_page);
        }
        copy_async_commit();
    }
    __device__ __forceinline__ void stage_scales(unsigned char* to, const unsigned char* from) const {
#pragma unroll(S::kExact ? 64 : 1)
        for (int i = 0; i < how_.scale_chunks; i += kStep)
            if (i + thread_ < how_.scale_chunks) copy_async16(to + (i + thread_) * 16, from + (i + thread_) * 16);
    }

    unsigned char* const memory_;
    const Staged how_;
    const Entries<S>& entries_;
    const int pages_, thread_;
    const unsigned char* page_;
    int next_;       // in the list
    int taken_ = 0;  // place in the ring of the page that is taken
};

}  // namespace kvstrata::cuda
