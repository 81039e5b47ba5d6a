// apply_plan: the only code that changes the state of a token.
#include <algorithm>

#include "common/check.h"
#include "common/fault.h"
#include "store/store.h"

namespace kvstrata::store {

int64_t Store::columns(int layer, std::span<const SeqId> seqs) {
    check_layer(layer, "columns");
    int64_t most = 0;
    for (SeqId id : seqs) {
        Sequence& s = find(id, "columns");
        for (int h = 0; h < layers_[layer].kv_heads; ++h) most = std::max<int64_t>(most, row_of(s, layer, h).stored);
    }
    return most;
}

// What a planner reads: positions i32 [B * H, columns] (-1 beyond a row's last token) and open u8 (in the open tail).
void Store::look(int layer, std::span<const SeqId> seqs, int32_t* positions, uint8_t* open, int64_t columns) {
    check_layer(layer, "look");
    const int heads = layers_[layer].kv_heads;
    std::fill_n(positions, seqs.size() * heads * columns, -1);
    std::fill_n(open, seqs.size() * heads * columns, uint8_t{0});
    for (size_t b = 0; b < seqs.size(); ++b) {
        for (int h = 0; h < heads; ++h) {
            const pages::Row& row = row_of(find(seqs[b], "look"), layer, h);
            check(row.stored <= columns, "look: columns is ", columns, ", expected at least ", row.stored);
            const int64_t offset = (static_cast<int64_t>(b) * heads + h) * columns;
            pages::positions(row, pools_[layer_pool_[layer]], positions + offset);
            int sealed = 0;
            for (int e = 0; e < row.sealed; ++e) sealed += std::popcount(row.alive[e]);
            std::fill_n(open + offset + sealed, row.stored - sealed, uint8_t{1});
        }
    }
}

// state u8 [B * H, columns]: for every row of the given sequences, in order, the State of each stored token in table
// order; columns beyond a row's stored tokens are not read. A token that is Full may stay Full or become Evicted; with
// `protect`, sinks and tail must stay as they are. Everything is checked before anything moves.
void Store::apply_plan(int layer, std::span<const SeqId> seqs, const uint8_t* state, int64_t columns, bool protect) {
    check_layer(layer, "apply_plan");
    check_sequences(seqs, "apply_plan");
    const int heads = layers_[layer].kv_heads;
    pages::Pool& pool = pools_[layer_pool_[layer]];
    std::vector<int32_t> pos;
    for (size_t b = 0; b < seqs.size(); ++b) {
        for (int h = 0; h < heads; ++h) {
            const pages::Row& row = row_of(find(seqs[b], "apply_plan"), layer, h);
            check(row.stored <= columns, "apply_plan: state has ", columns, " columns, expected at least the ",
                  row.stored, " stored tokens of head ", h);
            const uint8_t* want = state + (static_cast<int64_t>(b) * heads + h) * columns;
            pos.resize(row.stored);
            pages::positions(row, pool, pos.data());
            int i = 0;
            for (int e = 0; e < row.entries(); ++e) {
                for (uint16_t m = row.alive[e]; m; m &= m - 1, ++i) {
                    check(want[i] <= static_cast<uint8_t>(State::full), "apply_plan: state[", b * heads + h, ", ", i,
                          "] is ", int{want[i]}, ", expected 0 (Evicted) or 1 (Full)");
                    const bool kept = want[i] != 0 || !protect || (e < row.sealed && pos[i] >= options_.sinks);
                    check(kept, "apply_plan: state[", b * heads + h, ", ", i, "] evicts position ", pos[i],
                          ", which is protected (a sink, or in the tail)");
                }
            }
        }
    }
    fault::hit("plan.after_check");
    for (size_t b = 0; b < seqs.size(); ++b) {
        Sequence& s = find(seqs[b], "apply_plan");
        bool lossy = false;
        for (int h = 0; h < heads; ++h) {
            pages::Row& row = row_of(s, layer, h);
            const int32_t before = row.stored;
            const uint8_t* want = state + (static_cast<int64_t>(b) * heads + h) * columns;
            pages::evict(row, {want, static_cast<size_t>(row.stored)}, pool);
            lossy |= row.stored != before;
        }
        if (lossy) s.floor = std::max(s.floor, base(s, seen(layer, s)));
    }
}

}  // namespace kvstrata::store
