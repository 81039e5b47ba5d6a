// Sets of pages: what a view shows, and queries beside a sequence's own that say what its pages are worth.
#include <algorithm>
#include <bit>

#include "common/check.h"
#include "common/layout.h"
#include "store/store.h"

namespace kvstrata::store {

void Store::set_view(SeqId seq, pages::View view) {
    check(options_.sets, "set_view: this store has no sets");
    for (pages::SetTag set : view.sets) {
        check(set != pages::kBackbone && set <= pages::kMaxSet, "set_view: sets has ", set, ", expected 1..",
              pages::kMaxSet);
    }
    Sequence& s = find(seq, "set_view");
    s.view = std::move(view);
    for (pages::Row& row : s.rows) pages::arrange(row, s.view);
}

void Store::look_sets(int layer, std::span<const SeqId> seqs, pages::SetTag* out, int64_t columns) {
    check_layer(layer, "look_sets");
    check(options_.sets, "look_sets: this store has no sets");
    const int heads = layers_[layer].kv_heads;
    std::fill_n(out, static_cast<int64_t>(seqs.size()) * heads * columns, pages::kBackbone);
    for (size_t b = 0; b < seqs.size(); ++b) {
        for (int h = 0; h < heads; ++h) {
            const pages::Row& row = row_of(find(seqs[b], "look_sets"), layer, h);
            check(row.stored <= columns, "look_sets: columns is ", columns, ", expected at least ", row.stored);
            pages::SetTag* to = out + (static_cast<int64_t>(b) * heads + h) * columns;
            for (int e = 0; e < row.entries(); ++e) to = std::fill_n(to, std::popcount(row.alive[e]), row.set[e]);
        }
    }
}

void Store::attend_beside(int layer, SeqId seq, std::span<const int32_t> positions, const AttendCall& call) {
    check_layer(layer, "attend_beside");
    const int n = static_cast<int>(positions.size());
    check(n >= 1, "attend_beside: positions is empty, expected one of each query");
    const Sequence& s = find(seq, "attend_beside");
    const LayerShape& shape = layers_[layer];
    const int group = shape.q_heads / shape.kv_heads;
    const auto place = [&](const TokenTensor& t, DType dtype, int h) {
        return static_cast<unsigned char*>(t.data) + int64_t{h} * group * t.head * dtype_bytes(dtype);
    };
    attend_rows_.clear();
    for (int h = 0; h < shape.kv_heads; ++h) {
        ops::AttendRow r = attend_row(s, layer, h);
        r.q = place(call.q, options_.dtype, h);
        r.q_stride_t = call.q.token;
        r.q_stride_g = call.q.head;
        r.out = place(call.out, call.out_dtype, h);
        r.out_stride_t = call.out.token;
        r.out_stride_g = call.out.head;
        r.lse = reinterpret_cast<float*>(place(call.lse, DType::f32, h));
        r.lse_stride_t = call.lse.token;
        r.lse_stride_g = call.lse.head;
        r.q_pos = shape.window > 0 ? positions.data() : nullptr;
        r.queries = n;
        attend_rows_.push_back(r);
    }
    attend_now(layer, call, call.out_dtype);
    settle_workspace(n);
}

}  // namespace kvstrata::store
