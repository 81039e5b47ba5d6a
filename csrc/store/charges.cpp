// Who holds what: pages by who took them, and by how many share them.
#include <algorithm>
#include <map>

#include "store/store.h"

namespace kvstrata::store {

std::vector<Charge> Store::charges() const {
    std::vector<Charge> out;
    for (int p = 0; p < n_pools(); ++p) {
        for (const auto& [owner, pages] : pools_[p].charges()) out.push_back({owner, p, pages});
    }
    return out;
}

std::vector<Holding> Store::holdings(SeqId seq) {
    std::map<std::pair<int32_t, uint32_t>, int64_t> count;
    const auto add = [&](PageId page) {
        if (page != kNoPage) ++count[{page_pool(page), pages::pool_of(pools_, page).refs(page)}];
    };
    for (const pages::Row& row : find(seq, "holdings").rows) {
        for (PageId page : row.page) add(page);
        for (PageId page : row.back) add(page);
    }
    std::vector<Holding> out;
    for (const auto& [key, pages] : count) out.push_back({key.first, key.second, pages});
    return out;
}

std::vector<int64_t> Store::needed_each(int first_layer, int last_layer, int from, int to) {
    std::vector<int64_t> need(step_.size() * pools_.size(), 0);
    for (size_t b = 0; b < step_.size(); ++b) {
        const StepSequence& s = step_[b];
        const int64_t n = std::min(to, s.count) - std::min(from, s.count);
        for (int l = first_layer; l < last_layer; ++l) {
            int64_t& pages = need[b * pools_.size() + layer_pool_[l]];
            for (int h = 0; h < layers_[l].kv_heads; ++h) {
                pages += pages::pages_needed(row_of(*s.sequence, l, h), n, pools_[layer_pool_[l]]);
            }
        }
    }
    return need;
}

}  // namespace kvstrata::store
