// What calls of a step hand over: tensors as addresses and strides, and how a model turns q . k into logits.
#pragma once

#include <cstdint>
#include <vector>

#include "common/types.h"

namespace kvstrata::store {

// One tensor of a call: element (sequence b, token t, head h) at data + (b * batch + t * token + h * head) elements.
struct TokenTensor {
    void* data;
    int64_t batch, token, head;
};

struct AttendCall {
    TokenTensor q, out;  // [B, T, Hq, D], last dimension contiguous
    TokenTensor lse;     // f32 [B, T, Hq], or data = null
    const float* sinks;  // f32 [Hq] sink logits, or null
    DType out_dtype;
    float scale;
    float softcap;  // 0: none
    int32_t threads;
};

// How a layer's model turns q . k into logits; softcap 0: none.
struct Arithmetic {
    float scale;
    float softcap;
};

// Queries of spans that stand behind what is stored, and leave nothing: of row r = (sequence, KV head), head g, token t at
// q + (r * row + g * head + t * token) elements; ops/score_max.h.
struct SpanQueries {
    const void* q;  // [R, G, W, D], last dimension contiguous
    int64_t row, head, token;
    DType dtype;                        // f32, bf16, f16
    const float* lse;                   // [R, G, W]
    int32_t count;                      // W
    const std::vector<int32_t>& spans;  // [E + 1]
};

}  // namespace kvstrata::store
