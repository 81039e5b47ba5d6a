// Attention mass: what each stored token has received from all queries, the mean over the query heads of its KV head.
#include <algorithm>
#include <bit>

#include "common/check.h"
#include "common/layout.h"
#include "ops/mass.h"
#include "store/store.h"

namespace kvstrata::store {

namespace {

// attend writes log-sum-exps where its queries stand along the T axis of the call's tensors, padding in between.
int first_token(const ops::AttendRow& r) { return r.tokens ? r.tokens[0] : 0; }
int span(const ops::AttendRow& r) { return r.tokens ? r.tokens[r.queries - 1] - r.tokens[0] + 1 : r.queries; }

}  // namespace

// Gives every row of attend_rows_ a place for its logits and its log-sum-exps.
void Store::want_mass(int layer) {
    const int group = layers_[layer].q_heads / layers_[layer].kv_heads;
    size_t logits = 0, lse = 0;
    for (const ops::AttendRow& r : attend_rows_) {
        logits += static_cast<size_t>(group) * r.queries * r.entries * kSlots;
        lse += static_cast<size_t>(group) * span(r);
    }
    logits_.resize(logits);
    lse_.resize(lse);
    logits = lse = 0;
    for (ops::AttendRow& r : attend_rows_) {
        r.logits = logits_.data() + logits;
        r.lse = lse_.data() + lse - first_token(r);
        r.lse_stride_t = 1;
        r.lse_stride_g = span(r);
        logits += static_cast<size_t>(group) * r.queries * r.entries * kSlots;
        lse += static_cast<size_t>(group) * span(r);
    }
}

// Mass of a row's slots [entries * 16], the mean over its query heads. Its log-sum-exps are packed on the way.
void Store::reduce_mass(const ops::AttendRow& row, int group, std::vector<float>& out) {
    float* const lse = row.lse + first_token(row);
    for (int g = 0; g < group; ++g) {
        for (int t = 0; t < row.queries; ++t) {
            const int token = row.tokens ? row.tokens[t] - row.tokens[0] : t;
            lse[g * row.queries + t] = lse[g * row.lse_stride_g + token];
        }
    }
    out.resize(static_cast<size_t>(row.entries) * kSlots);
    ops::mass({row.logits, lse, out.data(), 1, group, row.queries, row.entries, ops::Reduce::sum, threads_});
    for (float& m : out) m /= static_cast<float>(group);
}

void Store::add_mass(pages::Row& row, const std::vector<float>& mass) {
    for (size_t i = 0; i < std::min(mass.size(), row.note.size()); ++i) {
        row.note[i] = std::bit_cast<uint32_t>(std::bit_cast<float>(row.note[i]) + mass[i]);
    }
}

void Store::add_mass(int layer, const TokenTensor& q, int from, int to, float scale, float softcap) {
    check(open_, "add_mass: no step is open");
    check_layer(layer, "add_mass");
    check(options_.massed, "add_mass: this store keeps no mass");
    check(to == done_[layer] && from < to, "add_mass: tokens ", from, "..", to, ", expected the last of ", done_[layer],
          " that were appended");
    const LayerShape& shape = layers_[layer];
    const int group = shape.q_heads / shape.kv_heads;
    attend_rows_.clear();
    for (size_t b = 0; b < step_.size(); ++b) {
        const StepSequence& s = step_[b];
        const int first = std::min(from, s.count), n = std::min(to, s.count) - first;
        if (n <= 0) continue;
        for (int h = 0; h < shape.kv_heads; ++h) {
            ops::AttendRow r = attend_row(*s.sequence, layer, h);
            r.q = static_cast<const unsigned char*>(q.data) +
                  (static_cast<int64_t>(b) * q.batch + static_cast<int64_t>(h) * group * q.head) *
                      dtype_bytes(options_.dtype);
            r.q_stride_t = q.token;
            r.q_stride_g = q.head;
            r.tokens = &tokens_[s.first + first];
            r.queries = r.own = n;
            attend_rows_.push_back(r);
        }
    }
    std::vector<float> out(shape.head_dim), mass;
    want_mass(layer);
    PoolView pools[kMaxPools];
    views(pools);
    size_t at = 0;
    for (size_t b = 0; b < step_.size(); ++b) {
        const StepSequence& s = step_[b];
        if (std::min(to, s.count) <= std::min(from, s.count)) continue;
        for (int h = 0; h < shape.kv_heads; ++h, ++at) {
            ops::AttendRow r = attend_rows_[at];
            r.out = out.data();  // of no use here
            r.out_stride_t = r.out_stride_g = 0;
            ops::AttendParams params{&r,    1,       group, shape.head_dim, options_.dtype, DType::f32, pools,
                                     scale, softcap, 0,     nullptr,        threads_};
            params.workspace = workspace(ops::attend_workspace_bytes(params));
            ops::attend(params);
            reduce_mass(r, group, mass);
            add_mass(row_of(*s.sequence, layer, h), mass);
        }
    }
    settle_workspace(longest_);
}

}  // namespace kvstrata::store
