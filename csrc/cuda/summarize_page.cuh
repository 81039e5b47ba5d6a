// What summarize reads of a page: means of some of its keys and values, distances from a vector, single keys.
#pragma once

#include "cuda/device/page.cuh"
#include "cuda/device/turn.cuh"

namespace kvstrata::cuda {

// The fields of a word of K, or of V, are successive dims, or slots.
template <Format F>
constexpr int kFields = 32 / format_bits(F);

// One page of format F, by a warp. What is unrolled is a function of its own: inlined, it would be most of the code wherever it is
// called.
template <Format F>
class SummaryPage {
  public:
    __device__ SummaryPage(const unsigned char* page, int dim, const float* centre)
        : page_(page), dim_(dim), group_(is_full(F) ? dim : group_size(F, dim)), centre_(centre) {}

    // mean [D] of the visible keys, in the domain that they are stored in. A lane sums the slots of its words, one by one.
    __device__ __attribute__((noinline)) void mean_keys(uint32_t visible, float* mean) const {
        const auto n = static_cast<float>(__popc(visible));
        for (int word = lane(); word < dim_ / kFields<F>; word += kWarp) {
            float sums[kFields<F>] = {};
            const auto* const line = reinterpret_cast<const uint4*>(page_) + word * 4;
#pragma unroll
            for (int quad = 0; quad < kSlots / 4; ++quad) {
                const uint4 four = line[quad];
                const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int slot = 4 * quad + i;
                    const float scale = scale_of(slot, word * kFields<F>);
#pragma unroll
                    for (int f = 0; f < kFields<F>; ++f) {
                        const float x = decode(words[i], field_of<F>(f).bit, scale, word * kFields<F> + f);
                        sums[f] += visible >> slot & 1 ? x : 0.0f;
                    }
                }
            }
#pragma unroll
            for (int f = 0; f < kFields<F>; ++f) mean[word * kFields<F> + f] = __fdiv_rn(sums[f], n);
        }
    }

    // |k - x|^2 of the lane's slot, lane % 16: dims d with d % 4 / 2 == lane / 16 in two sums, then those of the other lane.
    __device__ __attribute__((noinline)) float distance(const float* x) const {
        const int slot = lane() % kSlots, half = lane() / kSlots;
        float sums[2] = {};
        const auto add = [&](int word, int f, int i) {
            const int d = word * kFields<F> + f;
            const float key = decode(key_word(page_, word, slot), field_of<F>(f).bit, scale_of(slot, d), d);
            sums[i] = fmaf(key - x[d], key - x[d], sums[i]);
        };
#pragma unroll 4
        for (int d = 2 * half; d < dim_; d += 4) {
            add(d / kFields<F>, d % kFields<F>, 0);
            add((d + 1) / kFields<F>, (d + 1) % kFields<F>, 1);
        }
        const float sum = sums[0] + sums[1];
        return sum + __shfl_xor_sync(kAllLanes, sum, kSlots);
    }

    // x [D]: the key of a slot, in the domain that it is stored in.
    __device__ void take_key(int slot, float* x) const {
        for (int d = lane(); d < dim_; d += kWarp) {
            const uint32_t word = key_word(page_, d / kFields<F>, slot);
            x[d] = decode(word, field_of<F>(d % kFields<F>).bit, scale_of(slot, d), d);
        }
    }

    // mean [D] of the visible values, in the domain that they are stored in.
    __device__ __attribute__((noinline)) void mean_values(uint32_t visible, float* mean) const {
        const auto n = static_cast<float>(__popc(visible));
        for (int d = lane(); d < dim_; d += kWarp) {
            float sum = 0.0f;
#pragma unroll
            for (int slot = 0; slot < kSlots; ++slot) {
                const Field field = field_of<F>(slot);
                if (!(visible >> slot & 1)) continue;
                const uint32_t word = value_word(page_, F, dim_, field.word, d);
                if constexpr (is_full(F)) {
                    sum += element_in<F>(word, field.bit);
                } else {
                    const auto level = static_cast<float>(level_of<F>(code_in<F>(word, field.bit)));
                    sum = fmaf(value_scale(page_, F, dim_, d / group_, slot), level, sum);
                }
            }
            mean[d] = __fdiv_rn(sum, n);
        }
    }

    // x [D]: the key of a slot as the model has it. Lane l writes dims l, 32 + l, ...
    __device__ void model_key(int slot, const Rotation& rotation, float* x) const {
        for (int d = lane(); d < dim_; d += kWarp) x[d] = key<F>(page_, dim_, slot, d);
        if constexpr (is_full(F)) return;
        turn(x, rotation, true);
        for (int d = lane(); centre_ && d < dim_; d += kWarp) x[d] += centre_[d];
    }

  private:
    __device__ float scale_of(int slot, int d) const {
        if constexpr (is_full(F)) return 1.0f;
        return key_scale(page_, F, dim_, d / group_, slot);
    }
    __device__ float decode(uint32_t word, int bit, float scale, int d) const {
        if constexpr (is_full(F)) {
            return element_in<F>(word, bit);
        } else {
            const auto level = static_cast<float>(level_of<F>(code_in<F>(word, bit)));
            return centre_ ? fmaf(scale, level, centre_[d]) : scale * level;
        }
    }

    const unsigned char* page_;
    const int dim_, group_;
    const float* centre_;  // [D] in the domain of what is asked for, or null
};

}  // namespace kvstrata::cuda
