// summarize on CUDA: a warp per page. The formulas are in ops/summarize.h.
//
// A page is read once from memory and once more from the cache, when distances from the mean are taken; next to nothing is
// written: bound by reading pages. Means are summed, turned and coded operation by operation as on the CPU: codes are its bits.
#include "cuda/api.h"
#include "cuda/device/rows.cuh"
#include "cuda/summarize_page.cuh"
#include "ops/summarize.h"

namespace kvstrata::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRoom = 3;                         // vectors [D] of a warp
constexpr int kRegisters = kMaxHeadDim / kWarp;  // of a lane for one vector
constexpr uint16_t kNanBf16 = 0x7FC0;

struct SummarizeArgs {
    RowBatch<ops::SummaryItem> batch;
    Pools pools;
    Rotation rotation;
    SummaryKind kind;
};

// The bf16 at or below x, or at or above it: towards zero is to cut bits off.
__device__ uint16_t outwards(float x, bool up) {
    const uint32_t bits = __float_as_uint(x), cut = bits >> 16;
    const bool away = (bits & 0xFFFF) != 0 && (bits >> 31 != 0) != up;
    return static_cast<uint16_t>(away ? cut + 1 : cut);
}

// x [dim] becomes what its codes in -Levels..Levels say, scale * c, or 0 and a scale of NaN where it is not finite. The scale of
// few levels is a bf16 number. put(d, codes of d..d + 3, `Zero` added).
template <int Levels, int Zero, class Put>
__device__ float encode(float* x, int dim, Put put) {
    float most = 0.0f, total = 0.0f;
    for (int d = lane(); d < dim; d += kWarp) most = fmaxf(most, fabsf(x[d])), total += fabsf(x[d]);
    const bool finite = isfinite(warp_sum(total));
    float scale = finite ? __fdiv_rn(warp_max(most), static_cast<float>(Levels)) : NAN;
    if (Levels < 127 && finite) scale = from_bf16(outwards(scale, true));
    const float by = scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f;
    __syncwarp();
    for (int d = 4 * lane(); d < dim; d += 4 * kWarp) {
        uint32_t codes = 0;
        for (int i = 0; i < 4; ++i) {
            const int c = finite ? max(-Levels, min(Levels, __float2int_rn(x[d + i] * by))) : 0;
            codes |= static_cast<uint32_t>(c + Zero) << 8 * i;
            x[d + i] = scale * static_cast<float>(c);
        }
        put(d, codes);
    }
    __syncwarp();
    return scale;
}

// One item, by a warp; `room` is kRoom D floats of its own.
class Summary {
  public:
    __device__ Summary(const SummarizeArgs& args, const ops::SummaryItem& item, float* room)
        : a_(args), item_(item), dim_(args.rotation.dim), mean_(room), centre_(room + dim_), other_(room + 2 * dim_) {}

    __device__ void write() {
        if (item_.page < 0 || item_.visible == 0) return write_nothing();
        switch (format_at(a_.pools, item_.page)) {
            case Format::f32: return write_page<Format::f32>();
            case Format::bf16: return write_page<Format::bf16>();
            case Format::f16: return write_page<Format::f16>();
            case Format::int8: return write_page<Format::int8>();
            case Format::int4: return write_page<Format::int4>();
            case Format::int2: return write_page<Format::int2>();
        }
    }

  private:
    // Of the item's lane: a word of codes of d..d + 3, scale, spread and radius [3, 16], bounds, a value mean's words.
    __device__ uint32_t& codes(int d) const {
        return reinterpret_cast<uint32_t*>(item_.block)[d / 4 * kSlots + item_.lane];
    }
    __device__ uint32_t& line_of(int line) const {
        return reinterpret_cast<uint32_t*>(item_.block)[line * kSlots + item_.lane];
    }
    __device__ float* facts() const { return reinterpret_cast<float*>(item_.block + kSlots * dim_) + item_.lane; }
    __device__ uint16_t* bounds(int64_t from) const {
        return reinterpret_cast<uint16_t*>(item_.block + from) + item_.lane;
    }
    __device__ uint32_t& value_codes(int d) const {
        return reinterpret_cast<uint32_t*>(item_.block + values_offset(dim_) + item_.lane * dim_)[d / 4];
    }
    __device__ void put_value_facts(float scale, uint32_t slots) const {
        if (lane() != 0) return;
        reinterpret_cast<float*>(item_.block + value_scales_offset(dim_))[item_.lane] = scale;
        reinterpret_cast<uint32_t*>(item_.block + value_slots_offset(dim_))[item_.lane] = slots;
    }

    __device__ void write_nothing() const {
        constexpr uint32_t kZeroCodes = kZeroCode * 0x01010101u;
        if (a_.kind == SummaryKind::bounds) {
            for (int d = lane(); d < dim_; d += kWarp) {
                bounds(0)[d * kSlots] = bounds(upper_offset(dim_))[d * kSlots] = 0;
            }
            return;
        }
        if (is_split(a_.kind)) {
            const int pairs = pairs_of(a_.kind), means = pairs * dim_ / 4;
            for (int line = lane(); line < means; line += kWarp) line_of(line) = kZeroNibbles * 0x01010101u;
            if (lane() <= 2 * pairs) line_of(means + lane()) = 0;
            return;
        }
        for (int d = 4 * lane(); d < dim_; d += 4 * kWarp) codes(d) = kZeroCodes;
        if (lane() < 3) facts()[lane() * kSlots] = 0.0f;
        if (a_.kind == SummaryKind::mean) return;
        for (int d = 4 * lane(); d < dim_; d += 4 * kWarp) value_codes(d) = kZeroCodes;
        put_value_facts(0.0f, 0);
    }

    template <Format F>
    __device__ void write_page() {
        const unsigned char* const page = page_at(a_.pools, item_.page);
        if (a_.kind == SummaryKind::bounds) return write_bounds(SummaryPage<F>(page, dim_, item_.centre));
        const float* centre = nullptr;
        if (!is_full(F) && item_.centre) {
            for (int d = lane(); d < dim_; d += kWarp) centre_[d] = item_.centre[d];
            turn(centre_, a_.rotation, false);
            __syncwarp();
            centre = centre_;
        }
        const SummaryPage<F> keys(page, dim_, centre);
        if (is_split(a_.kind)) return write_parts(keys);
        write_mean(keys);
        if (a_.kind == SummaryKind::mean_value) write_values(keys);
    }

    template <Format F>
    __device__ void write_mean(const SummaryPage<F>& page) {
        page.mean_keys(item_.visible, mean_);
        __syncwarp();
        if (is_full(F)) turn(mean_, a_.rotation, false), __syncwarp();
        const float scale = encode<127, kZeroCode>(mean_, dim_, [&](int d, uint32_t four) { codes(d) = four; });
        float spread = 0.0f, radius = 0.0f;
        if (!isnan(scale)) {
            if (is_full(F)) turn(mean_, a_.rotation, true), __syncwarp();
            measure(item_.visible, page.distance(mean_), spread, radius);
        }
        if (lane() == 0) facts()[0] = scale, facts()[kSlots] = spread, facts()[2 * kSlots] = radius;
        __syncwarp();
    }

    template <Format F>
    __device__ void write_parts(const SummaryPage<F>& page) {
        write_nothing();
        __syncwarp();
        page.mean_keys(item_.visible, mean_);
        __syncwarp();
        bool finite = true;
        for (int d = lane(); d < dim_; d += kWarp) finite &= isfinite(mean_[d]);
        const int pairs = pairs_of(a_.kind), facts = pairs * dim_ / 4;  // scales of pairs, their spreads, slots
        if (!__all_sync(kAllLanes, finite)) {
            if (lane() < pairs) line_of(facts + lane()) = kNanBf16 * 0x10001u;
            return;
        }
        const uint32_t high = pairs == 2 ? second_part(page, item_.visible) : 0;
        uint32_t slots = high << 16;
        for (int pair = 0; pair < pairs; ++pair) {
            const uint32_t both = pair ? high : item_.visible & ~high, second = second_part(page, both);
            uint32_t scales = 0, spreads = 0;
            slots |= second;
            for (int i = 0; i < 2; ++i) {
                const uint32_t part = i ? second : both & ~second;
                if (part == 0) continue;
                float spread;
                const float scale = write_part(page, part, pair * (dim_ / 4), 4 * i, spread);
                scales |= static_cast<uint32_t>(outwards(scale, true)) << 16 * i;
                spreads |= static_cast<uint32_t>(outwards(spread, true)) << 16 * i;
            }
            if (lane() == 0) line_of(facts + pair) = scales, line_of(facts + pairs + pair) = spreads;
        }
        if (lane() == 0) line_of(facts + 2 * pairs) = slots;
    }

    // One part's mean into the nibbles from bit `shift` on of the lines from `line` on; its scale.
    template <Format F>
    __device__ float write_part(const SummaryPage<F>& page, uint32_t part, int line, int shift, float& spread) {
        __syncwarp();
        page.mean_keys(part, mean_);
        __syncwarp();
        if (is_full(F)) turn(mean_, a_.rotation, false), __syncwarp();
        const float scale = encode<7, kZeroNibble>(mean_, dim_, [&](int d, uint32_t four) {
            uint32_t& both = line_of(line + d / 4);
            both = (both & 0xF0F0F0F0u >> shift) | four << shift;
        });
        if (is_full(F)) turn(mean_, a_.rotation, true), __syncwarp();
        float radius;
        measure(part, page.distance(mean_), spread, radius);
        return scale;
    }

    // Of some slots those that lie nearer to the second of two means than to the first: ops/summarize.h.
    template <Format F>
    __device__ uint32_t second_part(const SummaryPage<F>& page, uint32_t slots) {
        if (__popc(slots) < 2) return 0;
        __syncwarp();
        page.mean_keys(slots, mean_);
        __syncwarp();
        page.take_key(farthest(page.distance(mean_), slots), other_);
        __syncwarp();
        float from_first = page.distance(other_);
        page.take_key(farthest(from_first, slots), mean_);
        uint32_t second = 0;
        for (int round = 0;; ++round) {
            __syncwarp();
            const float from_second = page.distance(mean_);
            const uint32_t nearer = __ballot_sync(kAllLanes, from_second < from_first) & slots;
            if (nearer == 0 || nearer == slots || nearer == second) break;
            second = nearer;
            if (round == ops::kSplitRounds) break;
            __syncwarp();
            page.mean_keys(slots & ~second, other_);
            page.mean_keys(second, mean_);
            __syncwarp();
            from_first = page.distance(other_);
        }
        return second & slots & (~slots + 1) ? slots & ~second : second;
    }

    // The one of some slots that has the largest square, the first of equals; squares in lanes 0..15.
    __device__ static int farthest(float square, uint32_t slots) {
        float most = 0.0f;
        int best = __ffs(static_cast<int>(slots)) - 1;
        for (int slot = 0; slot < kSlots; ++slot) {
            const float of_slot = __shfl_sync(kAllLanes, square, slot);
            if ((slots >> slot & 1) && of_slot > most) most = of_slot, best = slot;
        }
        return best;
    }

    // Of some slots, from the squares of the slots' distances in lanes 0..15.
    __device__ void measure(uint32_t slots, float square, float& spread, float& radius) const {
        float total = 0.0f, most = 0.0f;
        for (int slot = 0; slot < kSlots; ++slot) {
            const float of_slot = __shfl_sync(kAllLanes, square, slot);
            if (slots >> slot & 1) total += of_slot, most = fmaxf(most, of_slot);
        }
        const auto n = static_cast<float>(__popc(slots));
        spread = __fdiv_rn(total, n * static_cast<float>(dim_));
        radius = __fsqrt_rn(most);
    }

    template <Format F>
    __device__ void write_values(const SummaryPage<F>& page) {
        page.mean_values(item_.visible, mean_);
        __syncwarp();
        if (is_full(F)) turn(mean_, a_.rotation, false), __syncwarp();
        put_value_facts(encode<127, kZeroCode>(mean_, dim_, [&](int d, uint32_t four) { value_codes(d) = four; }),
                        item_.visible);
    }

    template <Format F>
    __device__ void write_bounds(const SummaryPage<F>& page) const {
        float lo[kRegisters], hi[kRegisters];
        bool finite = true;
#pragma unroll
        for (int s = 0; s < kRegisters; ++s) lo[s] = INFINITY, hi[s] = -INFINITY;
        for (uint32_t m = item_.visible; m; m &= m - 1) {
            page.model_key(__ffs(static_cast<int>(m)) - 1, a_.rotation, mean_);
#pragma unroll
            for (int s = 0; s < kRegisters; ++s) {
                const int d = s * kWarp + lane();
                const float x = d < dim_ ? mean_[d] : 0.0f;
                lo[s] = fminf(x, lo[s]), hi[s] = fmaxf(x, hi[s]);
                finite &= isfinite(x);
            }
        }
        finite = __all_sync(kAllLanes, finite);
#pragma unroll
        for (int s = 0; s < kRegisters; ++s) {
            const int d = s * kWarp + lane();
            if (d >= dim_) continue;
            bounds(0)[d * kSlots] = finite ? outwards(lo[s], false) : kNanBf16;
            bounds(upper_offset(dim_))[d * kSlots] = finite ? outwards(hi[s], true) : kNanBf16;
        }
    }

    const SummarizeArgs& a_;
    const ops::SummaryItem& item_;
    const int dim_;
    float *mean_, *centre_, *other_;
};

__global__ void __launch_bounds__(kThreads) summarize_pages(const __grid_constant__ SummarizeArgs args) {
    const int i = static_cast<int>(blockIdx.x) * warps() + warp();
    if (i >= args.batch.count) return;
    float* const room = reinterpret_cast<float*>(dynamic_shared()) + warp() * kRoom * args.rotation.dim;
    Summary(args, args.batch.rows[i], room).write();
}

}  // namespace
}  // namespace kvstrata::cuda

int kvstrata_cuda_summarize(const kvstrata::ops::SummarizeParams* params, void* stream) {
    using namespace kvstrata::cuda;
    constexpr int kItems = kThreads / kWarp;
    const auto& p = *params;
    const Pools pools = pools_of(p.pools);
    const Rotation r = rotation(p.head_dim);
    const size_t room = sizeof(float) * kRoom * kItems * static_cast<size_t>(p.head_dim);
    return in_batches(p.items, p.n_items, [&](const RowBatch<kvstrata::ops::SummaryItem>& batch) {
        return launch("summarize", summarize_pages, dim3(blocks_for(batch.count, kItems)), dim3(kThreads), room,
                      static_cast<cudaStream_t>(stream), SummarizeArgs{batch, pools, r, p.kind});
    });
}
