// What a step of one token reads: the pages that the summaries promise most of, and what that is estimated to miss.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "store/store.h"

namespace kvstrata::store {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

}  // namespace

void Store::select_pages(int layer, const AttendCall& call) {
    const LayerShape& shape = layers_[layer];
    const Recall& recall = options_.recall;
    const int group = shape.q_heads / shape.kv_heads, n = static_cast<int>(parts_.whole.size()), most = recall.widest();
    parts_.selected.resize(static_cast<size_t>(n) * most);
    parts_.votes.resize(recall.most > 0 ? parts_.selected.size() : 0);
    parts_.left.assign(n, 0.0f);
    parts_.rest.resize(static_cast<size_t>(n) * group);
    parts_.select.assign(n, {});
    for (int r = 0; r < n; ++r) {
        const pages::Row& row = *parts_.rows[r];
        const ops::AttendRow& whole = parts_.whole[r];
        ops::SelectRow& out = parts_.select[r];
        out.q = static_cast<const unsigned char*>(whole.q) +
                whole.tokens[0] * whole.q_stride_t * dtype_bytes(options_.dtype);
        out.q_stride_g = whole.q_stride_g;
        out.blocks = parts_.indices[r]->blocks();
        out.visible = row.visible.data();
        out.lse_base = parts_.lse[0].data() + static_cast<int64_t>(r) * group;
        out.first = first_indexed(row);
        out.entries = row.sealed;
        out.most = most;
        out.selected = parts_.selected.data() + static_cast<int64_t>(r) * most;
        out.lse_rest = parts_.rest.data() + static_cast<int64_t>(r) * group;
        if (recall.most > 0) out.votes = parts_.votes.data() + static_cast<int64_t>(r) * most;
    }
    ops::SelectParams p{
        parts_.select.data(), n,       group,    shape.head_dim, options_.dtype, call.scale,  recall.weight,
        recall.aggregate,     nullptr, threads_, recall.kind,    call.softcap,   recall.mass, recall.least};
    p.workspace = workspace(ops::select_workspace_bytes(p));
    ops::select(p);
    for (int r = 0; recall.most > 0 && r < n; r += shape.kv_heads) share_pages(r, shape.kv_heads);
}

// Of what the rows of a sequence have selected, the K each of highest vote stay, ties those of the lower row and entry; at
// least `least` of each row. Their order stays.
void Store::share_pages(int first, int rows) {
    const Recall& recall = options_.recall;
    struct Choice {
        bool given;  // one of the row's best
        float vote;
        int row, place;
    };
    std::vector<Choice> all;
    for (int r = first; r < first + rows; ++r) {
        const ops::SelectRow& row = parts_.select[r];
        const size_t begin = all.size();
        for (int i = 0; i < row.count; ++i) all.push_back({false, row.votes[i], r, i});
        std::sort(all.begin() + static_cast<int64_t>(begin), all.end(), [](const Choice& a, const Choice& b) {
            return std::tuple(-a.vote, a.place) < std::tuple(-b.vote, b.place);
        });
        for (int i = 0; i < std::min(recall.least, row.count); ++i) all[begin + i].given = true;
    }
    const size_t most = static_cast<size_t>(recall.pages) * rows;
    if (all.size() <= most) return;
    std::sort(all.begin(), all.end(), [](const Choice& a, const Choice& b) {
        return std::tuple(!a.given, -a.vote, a.row, a.place) < std::tuple(!b.given, -b.vote, b.row, b.place);
    });
    const int group = static_cast<int>(parts_.rest.size() / parts_.select.size());
    for (size_t i = most; i < all.size(); ++i) {
        ops::SelectRow& row = parts_.select[all[i].row];
        parts_.left[all[i].row] += row.votes[all[i].place] / static_cast<float>(group);
        row.selected[all[i].place] = -1;
    }
    for (int r = first; r < first + rows; ++r) {
        ops::SelectRow& row = parts_.select[r];
        int32_t* const end = std::remove(row.selected, row.selected + row.count, -1);
        std::fill(end, row.selected + row.count, -1);
        row.count = static_cast<int32_t>(end - row.selected);
    }
}

// read, rest: [G] of a row; left: the share of attention that its selection gave up to others.
void Store::note_captured(const float* read, const float* rest, int group, float left) {
    for (int g = 0; g < group; ++g) {
        const float of_rest = rest[g] == kMinusInf ? 1.0f : 1.0f / (1.0f + std::exp(rest[g] - read[g]));
        const float share = of_rest * (1.0f - std::min(left, 1.0f));
        captured_.sum += share;
        captured_.least = std::min(captured_.least, share);
        captured_.below += share < mass_floor_;
        ++captured_.count;
    }
}

}  // namespace kvstrata::store
