// choose_states on CUDA: one block per row. The rule is in ops/choose_states.h.
//
// A pass over a row reads 9 bytes a token, from the L2 cache after the first: two passes where all fits, eight more for each
// threshold that is looked for, by digits of the ranks. Nothing is sorted. Whole numbers throughout: the CPU's answer.
#include "cuda/api.h"
#include "cuda/device/ranks.cuh"
#include "cuda/device/rows.cuh"

namespace kvstrata::cuda {
namespace {

constexpr int kThreads = 512;
constexpr uint8_t kEvicted = static_cast<uint8_t>(State::evicted), kFull = static_cast<uint8_t>(State::full);
constexpr int kFirst = static_cast<int>(State::int8), kKinds = 3;  // of quantized states

struct ChooseRow {
    ops::ChooseStatesRow row;
    uint8_t* kind;  // [N] of tokens without a place: what they are, then what they may become; 0: the others
};

struct ChooseArgs {
    RowBatch<ChooseRow> batch;
    int32_t tokens;
    uint8_t quantized;
};

__device__ inline int64_t pages_of(int64_t tokens) { return (tokens + kSlots - 1) / kSlots; }

struct Counts {
    int64_t of[kKinds];

    __device__ int64_t pages() const { return pages_of(of[0]) + pages_of(of[1]) + pages_of(of[2]); }
};

struct ChooseRoom {
    RankRoom rank;
    int count[kDigits][kKinds];
    Counts run;
    int digit, left;
};

class Choice {
  public:
    __device__ Choice(const ChooseArgs& args, const ChooseRow& work, ChooseRoom& room)
        : row_(work.row), kind_(work.kind), n_(args.tokens), quantized_(args.quantized), room_(room) {}

    __device__ void run() {
        each([&](int i) {
            const uint8_t state = row_.positions[i] < 0 ? kEvicted : row_.now[i];
            row_.out[i] = state;
            kind_[i] = row_.protect[i] ? kEvicted : state;
        });
        const int full = count(kFull);
        const int64_t room = kSlots * (row_.full_pages < n_ ? row_.full_pages : n_);
        if (0 < room && room < full) take(kFull, full, room);
        const uint8_t done = room < full ? kEvicted : kFull;
        each([&](int i) { kind_[i] = kind_[i] <= done ? kEvicted : max(kind_[i], quantized_); });
        quantize_rest();
    }

  private:
    template <class Visit>
    __device__ void each(Visit visit) {
        for (int i = static_cast<int>(threadIdx.x); i < n_; i += kThreads) visit(i);
        __syncthreads();
    }
    __device__ int count(uint8_t k) {
        return count_of(n_, room_.rank.warps, [&](int i) { return kind_[i] == k; });
    }
    __device__ static uint8_t max(uint8_t a, uint8_t b) { return a > b ? a : b; }

    // The larger the better: the upper half orders the scores, the lower half the ages. Never 0.
    __device__ uint64_t key(int i) const {
        const float score = isfinite(row_.score[i]) ? row_.score[i] : -INFINITY;
        return static_cast<uint64_t>(ordered(score)) << 32 | (0x7FFFFFFFu - static_cast<uint32_t>(row_.positions[i]));
    }

    __device__ void quantize_rest() {
        Counts counts;
        int kinds = 0;
        for (int k = 0; k < kKinds; ++k) {
            counts.of[k] = count(static_cast<uint8_t>(kFirst + k));
            kinds += counts.of[k] > 0;
        }
        const bool fits = counts.pages() <= row_.quant_pages;
        if (fits || row_.quant_pages == 0) {
            each([&](int i) {
                if (kind_[i]) row_.out[i] = fits ? kind_[i] : kEvicted;
            });
            return;
        }
        Counts run = {{kSlots * row_.quant_pages, kSlots * row_.quant_pages, kSlots * row_.quant_pages}};
        if (kinds > 1) run = longest_run();
        for (int k = 0; k < kKinds; ++k) {
            if (counts.of[k]) take(static_cast<uint8_t>(kFirst + k), counts.of[k], kSlots * pages_of(run.of[k]));
        }
    }

    // The best `room` tokens of a kind, of so many, get it as their state and are done; its others are Evicted.
    __device__ void take(uint8_t k, int64_t all, int64_t room) {
        Rank least = {0, kAllTies};
        if (room <= 0) {
            least.key = ~uint64_t{0};
        } else if (room < all) {
            least =
                nth_largest(n_, static_cast<int>(room), room_.rank, [&](int i) { return kind_[i] == k ? key(i) : 0; });
        }
        const bool whole = least.ties == kAllTies;
        each([&](int i) {
            if (kind_[i] != k) return;
            const uint64_t mine = key(i);
            const bool yes = mine > least.key || (whole && mine == least.key);
            row_.out[i] = yes ? k : kEvicted;
            if (yes) kind_[i] = 0;
        });
        if (whole) return;
        place_in_order(
            n_, room_.rank.warps, [&](int i) { return kind_[i] == k && key(i) == least.key; },
            [&](int place, int i) {
                if (place < least.ties) row_.out[i] = k, kind_[i] = 0;
            });
    }

    // Counts of the longest run of tokens, by rank, that the pages hold; not all do. Digits that fit as a whole are counted, the
    // one that does not is looked into, first of the keys, then of the places: the lower one is before.
    __device__ Counts longest_run() {
        constexpr int kLevels = 12;
        if (threadIdx.x == 0) room_.run = {}, room_.left = n_;
        uint64_t prefix = 0;
        uint32_t place = 0;
        __syncthreads();
        for (int level = 0; level < kLevels && room_.left > 1; ++level) {
            const int shift = level < 8 ? 56 - 8 * level : 88 - 8 * level;
            int* const counts = &room_.count[0][0];
            for (int d = static_cast<int>(threadIdx.x); d < kDigits * kKinds; d += kThreads) counts[d] = 0;
            __syncthreads();
            each_of_warp(Segment(n_), [&](int i, bool inside) {
                const uint8_t k = inside ? kind_[i] : kEvicted;
                const uint64_t mine = k ? key(i) : 0;
                const uint32_t at = ~static_cast<uint32_t>(i);
                bool counted = k != 0;
                if (level > 0 && level <= 8) counted &= mine >> (level < 8 ? shift + 8 : 0) == prefix;
                if (level > 8) counted &= mine == prefix && at >> (shift + 8) == place;
                const auto digit = static_cast<int>((level < 8 ? mine >> shift : at >> shift) & (kDigits - 1));
                tally(counts, digit * kKinds + (k ? k - kFirst : 0), counted);
            });
            __syncthreads();
            if (warp() == 0) find_cut();
            __syncthreads();
            const auto digit = static_cast<unsigned>(room_.digit);
            if (level < 8) prefix = prefix << 8 | digit;
            if (level >= 8) place = place << 8 | digit;
        }
        const Counts run = room_.run;
        __syncthreads();
        return run;
    }

    // One warp; lane 0 has the highest eight digits.
    __device__ void find_cut() {
        constexpr int kRun = kDigits / kWarp;
        const int top = kDigits - 1 - kRun * lane();
        Counts before;
        for (int k = 0; k < kKinds; ++k) {
            int mine = 0;
            for (int j = 0; j < kRun; ++j) mine += room_.count[top - j][k];
            before.of[k] = room_.run.of[k] + sum_upto(mine) - mine;
        }
        __syncwarp();
        for (int j = 0; j < kRun; ++j) {
            Counts with = before;
            int here = 0;
            for (int k = 0; k < kKinds; ++k) with.of[k] += room_.count[top - j][k], here += room_.count[top - j][k];
            if (before.pages() <= row_.quant_pages && with.pages() > row_.quant_pages) {
                room_.digit = top - j, room_.left = here, room_.run = before;
            }
            before = with;
        }
    }

    const ops::ChooseStatesRow& row_;
    uint8_t* const kind_;
    const int n_;
    const uint8_t quantized_;
    ChooseRoom& room_;
};

__global__ void __launch_bounds__(kThreads) choose_rows(const __grid_constant__ ChooseArgs args) {
    __shared__ ChooseRoom room;
    Choice(args, args.batch.rows[blockIdx.x], room).run();
}

int64_t row_bytes(const ops::ChooseStatesParams& p) { return (p.tokens + int64_t{63}) / 64 * 64; }

}  // namespace
}  // namespace kvstrata::cuda

int64_t kvstrata_cuda_choose_states_workspace_bytes(const kvstrata::ops::ChooseStatesParams* params) {
    return kvstrata::cuda::row_bytes(*params) * params->n_rows;
}

int kvstrata_cuda_choose_states(const kvstrata::ops::ChooseStatesParams* params, void* stream) {
    using namespace kvstrata::cuda;
    const auto& p = *params;
    auto* kind = static_cast<uint8_t*>(p.workspace);
    const auto row_of = [&](const kvstrata::ops::ChooseStatesRow& row) {
        const ChooseRow work{row, kind};
        kind += row_bytes(p);
        return work;
    };
    return in_batches_of<ChooseRow>(p.rows, p.n_rows, row_of, [&](const RowBatch<ChooseRow>& batch) {
        return launch("choose_states", choose_rows, dim3(static_cast<unsigned>(batch.count)), dim3(kThreads), 0,
                      static_cast<cudaStream_t>(stream),
                      ChooseArgs{batch, p.tokens, static_cast<uint8_t>(p.quantized)});
    });
}
