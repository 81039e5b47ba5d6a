// Groups for a plan: tokens of one segment of a row, clustered by their keys as stored.
#include <algorithm>
#include <bit>

#include "common/check.h"
#include "ops/cluster.h"
#include "ops/quantize.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

// The tokens of one segment: their keys and where they stand among the row's columns.
struct Segment {
    int row, number;
    std::vector<float> keys;       // [T, D]
    std::vector<int32_t> columns;  // [T]
    std::vector<int32_t> page_of;  // [T]
};

// Segments of a row's tokens; decode(page, k, v) gives those of a page, f32 [16, D] each.
template <class Decode>
void collect(const pages::Row& row, const int32_t* segment, int r, int dim, std::vector<Segment>& out, Decode decode) {
    std::vector<float> k(static_cast<size_t>(kSlots) * dim), v(k.size());
    const size_t first = out.size();
    int i = 0;
    for (int e = 0; e < row.entries(); i += std::popcount(row.alive[e]), ++e) {
        const int32_t* const named = segment + i;
        if (std::all_of(named, named + std::popcount(row.alive[e]), [](int32_t s) { return s < 0; })) continue;
        decode(row.page[e], k.data(), v.data());
        int t = 0;
        for (uint16_t m = row.alive[e]; m; m &= m - 1, ++t) {
            if (named[t] < 0) continue;
            const auto same = std::find_if(out.begin() + static_cast<int64_t>(first), out.end(),
                                           [&](const Segment& s) { return s.number == named[t]; });
            Segment& s = same == out.end() ? out.emplace_back(Segment{r, named[t], {}, {}, {}}) : *same;
            const float* const key = k.data() + static_cast<size_t>(std::countr_zero(m)) * dim;
            s.keys.insert(s.keys.end(), key, key + dim);
            s.columns.push_back(i + t);
        }
    }
    for (size_t j = first; j < out.size(); ++j) out[j].page_of.resize(out[j].columns.size());
}

}  // namespace

Waiting Store::waiting(int layer, std::span<const SeqId> seqs) {
    check_layer(layer, "waiting");
    Waiting most;
    for (SeqId id : seqs) {
        Sequence& s = find(id, "waiting");
        for (int h = 0; h < layers_[layer].kv_heads; ++h) {
            const pages::Row& row = row_of(s, layer, h);
            Waiting found;
            for (int e = first_indexed(row); e < row.sealed; ++e) {
                if (row.want[e] & pages::kGrouped) continue;
                found.tokens += std::popcount(row.alive[e]);
                if (!(row.want[e] & pages::kProvisional)) found.fresh += std::popcount(row.alive[e]);
            }
            most = {std::max(most.tokens, found.tokens), std::max(most.fresh, found.fresh)};
        }
    }
    return most;
}

// segment i32 [R, columns]: the segment of each stored token in table order, -1: none. group
// likewise: tokens of one number are to share a page, -1: none. Rows in batches, so that few keys lie decoded at a time.
void Store::cluster(int layer, std::span<const SeqId> seqs, const int32_t* segment, int32_t* group, int64_t columns,
                    int iters) {
    check_layer(layer, "cluster");
    const int heads = layers_[layer].kv_heads, rows = static_cast<int>(seqs.size()) * heads,
              dim = layers_[layer].head_dim;
    std::fill_n(group, rows * columns, -1);
    PoolView pools[kMaxPools];
    views(pools);
    std::vector<Segment> segments;
    std::vector<int32_t> next(rows, 0);  // group number of each row
    for (int first = 0; first < rows; first += threads_) {
        segments.clear();
        for (int r = first; r < std::min(rows, first + threads_); ++r) {
            const Sequence& s = find(seqs[r / heads], "cluster");
            const pages::Row& row = s.rows[first_row_[layer] + r % heads];
            check(row.stored <= columns, "cluster: columns is ", columns, ", expected at least ", row.stored);
            collect(row, segment + r * columns, r, dim, segments, [&](PageId page, float* k, float* v) {
                if (far(page)) {
                    const PageId stage = ring_of(page_pool(page)).back();
                    read_far(page, stage);
                    page = stage;
                }
                const float* const mean = centre(s, layer, r % heads);
                const int32_t zero = 0;
                ops::dequantize({&page, mean, mean ? &zero : nullptr, 1, dim, k, v, pools, 1});
            });
        }
        std::vector<ops::ClusterRow> work;
        for (Segment& s : segments) {
            work.push_back({s.keys.data(), nullptr, s.page_of.data(), static_cast<int32_t>(s.columns.size()), 0});
        }
        ops::ClusterParams p{work.data(), static_cast<int32_t>(work.size()), dim, iters, nullptr, threads_};
        const bool greedy = iters < 0;
        const int64_t bytes = greedy ? ops::cluster_greedy_workspace_bytes(p) : ops::cluster_workspace_bytes(p);
        std::vector<unsigned char> memory(static_cast<size_t>(bytes) + 64);
        p.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        greedy ? ops::cluster_greedy(p) : ops::cluster(p);
        for (size_t i = 0; i < segments.size(); ++i) {
            const Segment& s = segments[i];
            int32_t* const out = group + s.row * columns;
            for (size_t t = 0; t < s.columns.size(); ++t) out[s.columns[t]] = next[s.row] + s.page_of[t];
            next[s.row] += work[i].pages;
        }
    }
}

}  // namespace kvstrata::store
