// score_keys: scores that need no query.
//
//   norm:       score[k, i] = -|k_i|_2
//   diversity:  score[k, i] = -cos(k_i, sum_j k_j / |k_j|)          j: the row's visible slots; 0 where either is 0
//
// Hidden slots: 0. Quantized pages are read in the rotated domain with the rotated centre added back: a rotation keeps
// norms and angles; a row that mixes them with full pages has its anchor in both domains. NaN and Inf in a visible key
// show in their own slot (norm) or row (diversity) only.
//
// Units of 32 entries, anchors added in the order of the list: bits depend on the row alone.
#pragma once

#include "ops/pool_view.h"

namespace kvstrata::ops {

enum class KeyScore : uint8_t { norm = 0, diversity = 1 };

struct KeysRow {              // one (sequence, KV head)
    const PageId* pages;      // [M]; -1: skipped
    const uint16_t* visible;  // [M] slot masks, or null: all slots
    const float* centre;      // [D] of the keys of quantized pages (quantize.h), or null: zeros
    float* score;             // [M, 16]
    int32_t entries;          // M
};

struct ScoreKeysParams {
    const KeysRow* rows;  // [R]
    int32_t n_rows;
    int32_t head_dim;  // D, 1..512
    KeyScore kind;
    const PoolView* pools;  // [8]
    void* workspace;        // score_keys_workspace_bytes(params) bytes, 64-byte aligned
    int32_t threads;
};

int64_t score_keys_workspace_bytes(const ScoreKeysParams& params, const Where& where = {});
void score_keys(const ScoreKeysParams& params, const Where& where = {});

}  // namespace kvstrata::ops
