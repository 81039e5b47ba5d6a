#include "ops/chunk_order.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/radix_sort.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kKinds = ops::kMaxKind + 1;

int64_t worker_bytes(const ops::ChunkOrderParams& p) {
    return (p.tokens * 2 * static_cast<int64_t>(sizeof(Keyed)) + 63) / 64 * 64;
}

// Tokens that are in a chunk, with keys that rise as they shall follow each other. Returns how many.
int64_t list(const ops::ChunkOrderRow& row, int tokens, Keyed* out) {
    int64_t n = 0;
    bool in_order = true;
    int32_t last = INT32_MIN;
    for (int i = 0; i < tokens; ++i) {
        if (!row.kind[i]) continue;
        const uint32_t by_age = static_cast<uint32_t>(row.pos[i]) ^ 0x80000000u;
        out[n++] = {static_cast<uint64_t>(~ordered(row.value[i])) << 32 | by_age, i, row.kind[i]};
        in_order &= row.pos[i] >= last;
        last = row.pos[i];
    }
    // The sort is stable: places that rise with the positions need no digits for them.
    for (int64_t i = 0; in_order && i < n; ++i) out[i].key &= ~uint64_t{0xFFFFFFFFu};
    return n;
}

void order_row(const ops::ChunkOrderRow& row, int tokens, int chunks, Keyed* space) {
    const int64_t n = list(row, tokens, space);
    const Keyed* const sorted = radix_sort(space, space + tokens, n);
    int32_t count[kKinds] = {}, at[kKinds];
    for (int64_t i = 0; i < n; ++i) ++count[sorted[i].part];
    int32_t sum = 0;
    for (int k = 0; k < kKinds; ++k) at[k] = sum, sum += count[k];
    for (int64_t i = 0; i < n; ++i) row.order[at[sorted[i].part]++] = sorted[i].item;
    std::fill(row.order + n, row.order + tokens, -1);
    const int32_t* next = row.order;
    int m = 0;
    for (const int32_t tokens_of_kind : count) {
        for (int32_t first = 0; first < tokens_of_kind; first += kSlots) {
            float total = 0.0f;
            const int32_t in_chunk = std::min(kSlots, tokens_of_kind - first);
            for (int32_t i = 0; i < in_chunk; ++i) total += row.value[*next++];
            row.w[m++] = total;
        }
    }
    std::fill(row.w + m, row.w + chunks, 0.0f);
    *row.items = m;
}

}  // namespace

int64_t chunk_order_workspace_bytes(const ops::ChunkOrderParams& p) { return worker_bytes(p) * std::max(1, p.threads); }

void chunk_order(const ops::ChunkOrderParams& p) {
    parallel(p.n_rows, p.threads, [&](int64_t row, int worker) {
        unsigned char* const space = static_cast<unsigned char*>(p.workspace) + worker_bytes(p) * worker;
        order_row(p.rows[row], p.tokens, p.chunks, reinterpret_cast<Keyed*>(space));
    });
}

}  // namespace kvstrata::cpu
