// How the window queries of a call are cut into units of work, and where each unit keeps what it finds.
//
// A unit is a chunk of a row's entries for one block of its query heads. The first pass takes shares e of the unit's own
// largest logits; the second needs only a factor for each query. Between the passes e is kept in the workspace where it
// has room, else it is computed again, to the same bits. So a call goes in waves of as many blocks as can be kept. The
// cut into units depends on the row alone.
#pragma once

#include "common/layout.h"
#include "cpu/parallel.h"
#include "cpu/window_block.h"

namespace kvstrata::cpu {

inline constexpr int kUnitEntries = 32;  // entries of a unit

struct WindowPart {          // of one row
    int32_t first_unit;      // of the call; a row's units lie block by block
    int32_t chunks, blocks;  // units of a block; blocks of query heads
    int32_t heads, rows;     // of a block but perhaps the last; its queries, in whole register tiles
    int64_t partials, lse;   // f32 index: [chunks, G, partial floats]; [G, T]
    int64_t tiles;           // f32 index of its first tile, were all tiles of the call kept
    int64_t past;            // slots of the past, where the op counts them
};

// What the first pass finds in a unit; e [count, rows, 16] follows.
struct WindowHead {
    int32_t count;                  // entries that some query reads,
    int32_t entries[kUnitEntries];  // which they are,
    uint16_t slots[kUnitEntries];   // and which slots of each
};
struct WindowFound {
    WindowHead* head;
    float *maximum, *total, *moved;  // [rows] largest logit, sum of e, sum of e (z - maximum) where the op wants it
    float* e;
};

struct WindowScratch {  // of one thread; B: queries of a block
    BlockScratch block;
    float *sums, *factor;   // [G, 4, 16], [B]
    float* tile;            // of a unit that is not kept
    uint16_t* query_masks;  // [T]
};

struct WindowUnitId {
    int32_t row, block, chunk;
};
struct WindowWave {
    int32_t begin, end;  // units: whole blocks
    int64_t tiles;       // f32 index of the first unit's tile, as in WindowPart
    bool kept;
};

class WindowPlan {
  public:
    // Fills params.workspace. `head_sums`: floats that a unit keeps of each head in the second pass.
    WindowPlan(const ops::WindowParams& params, int head_sums);
    static int64_t bytes(const ops::WindowParams& params, int head_sums);

    int threads() const;  // that its work is worth
    WindowPart& part(int row) const { return parts_[row]; }
    WindowUnitId at(int unit) const;
    float* partial(int row, int chunk, int head) const;  // [max(T, head_sums)]
    float* lse(int row, int head) const { return floats_ + parts_[row].lse + head * p_.rows[row].queries; }
    WindowScratch scratch(int worker) const;
    WindowFound found(const WindowWave& wave, int unit, int worker) const;

    // Wave by wave: first(wave, unit, worker) for each unit, then merge(row, head, heads) for each block, then second.
    template <class First, class Merge, class Second>
    void run(First first, Merge merge, Second second) const {
        for (WindowWave wave = wave_from(0); wave.begin < wave.end; wave = wave_from(wave.end)) {
            const int n = wave.end - wave.begin;
            parallel(n, threads(),
                     [&](int64_t i, int worker) { first(wave, wave.begin + static_cast<int>(i), worker); });
            parallel(n, threads(), [&](int64_t i, int) {
                const WindowUnitId id = at(wave.begin + static_cast<int>(i));
                const int head = id.block * parts_[id.row].heads;
                if (id.chunk == 0) merge(id.row, head, heads(id.row, id.block));
            });
            parallel(n, threads(),
                     [&](int64_t i, int worker) { second(wave, wave.begin + static_cast<int>(i), worker); });
        }
    }
    int heads(int row, int block) const;

  private:
    struct Sizes;
    WindowWave wave_from(int unit) const;

    const ops::WindowParams& p_;
    const int head_sums_;
    int units_ = 0;
    int64_t capacity_, scratch_bytes_;
    int32_t scratch_rows_;
    WindowPart* parts_;
    float *floats_, *kept_;
    unsigned char* scratch_;
};

// Between the passes: log-sum-exps of some heads of a row from its units' in order, with sink logits [G] or null.
void merge_lse(const ops::WindowParams& params, const WindowPlan& plan, int row, int head, int heads,
               const float* sinks);

}  // namespace kvstrata::cpu
