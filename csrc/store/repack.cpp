#include "store/repack.h"

#include <algorithm>
#include <bit>

namespace kvstrata::store {
namespace {

class Packing {
  public:
    Packing(const pages::Row& row, const RowPlan& plan, int fixed, pages::Pools& pools, const Kind* kinds)
        : row_(row), plan_(plan), fixed_(fixed), pools_(pools), kinds_(kinds) {}

    Repack run(int most) {
        r_.keep = row_.alive;
        r_.tag = row_.set;
        r_.first.resize(row_.entries() + 1, 0);
        for (int e = 0; e < row_.entries(); ++e) r_.first[e + 1] = r_.first[e] + std::popcount(row_.alive[e]);
        for (int e : rewritten(most)) collect(e);
        for (int e = 0; row_.tagged && e < row_.sealed; ++e) {
            if (!r_.gone(e) && holds(e)) retag(e);  // of others a later piece says more
        }
        for (int e = 0; e < row_.sealed; ++e) {
            if (joins(e)) collect(e);
        }
        for (int e = 0; e < row_.entries(); ++e) {
            if (narrows(e)) narrow(e);
        }
        for (auto& tier : r_.to) {
            for (auto& survivors : tier) std::stable_sort(survivors.begin(), survivors.end(), before);
        }
        paginate();
        return std::move(r_);
    }

  private:
    Kind kind(int e) const { return kinds_[page_pool(row_.page[e])]; }
    bool narrows(int e) const { return e >= row_.sealed || e < fixed_ || kind(e).tier == Tier::far; }
    Kind wanted(int i, Kind now) const {
        return {static_cast<State>(plan_.state[i]), plan_.tier ? static_cast<Tier>(plan_.tier[i]) : now.tier};
    }
    int32_t group(int i) const { return plan_.group ? plan_.group[i] : -1; }

    pages::SetTag set(int i, int e) const {
        return plan_.set ? plan_.set[i] : row_.tagged ? row_.set[e] : pages::kBackbone;
    }

    static uint8_t want_of(int32_t group) {
        return group < 0 ? 0 : group < kProvisionalGroup ? pages::kGrouped : pages::kProvisional;
    }
    static bool before(const Survivor& a, const Survivor& b) {
        if (a.set != b.set) return a.set < b.set;
        return a.group != b.group ? a.group < b.group : a.position < b.position;
    }

    // Does every token of an entry stay what and where it is?
    bool holds(int e) const {
        const Kind now = kind(e);
        for (int i = r_.first[e]; i < r_.first[e + 1]; ++i) {
            if (narrows(e) && plan_.state[i] == 0) continue;  // it only loses its slot
            if (wanted(i, now) != now || group(i) >= 0 || set(i, e) != set(r_.first[e], e)) return false;
        }
        return true;
    }

    std::vector<int> rewritten(int most) {
        std::vector<int> found;
        for (int e = 0; e < row_.sealed; ++e) {
            if (!holds(e)) found.push_back(e);
        }
        r_.changing = static_cast<int>(found.size());
        if (r_.changing <= most) return found;
        const auto left = [&](int e) {
            return std::count_if(plan_.state + r_.first[e], plan_.state + r_.first[e + 1],
                                 [](uint8_t state) { return state != 0; });
        };
        std::stable_sort(found.begin(), found.end(), [&](int a, int b) { return left(a) < left(b); });
        found.resize(most);
        std::sort(found.begin(), found.end());
        return found;
    }

    // A part-filled page whose tokens stay what they are goes along with others of its kind that are packed.
    bool joins(int e) const {
        if (e < fixed_ || r_.gone(e) || row_.alive[e] == kAllSlots ||
            row_.want[e] & (pages::kGrouped | pages::kProvisional) || !holds(e))
            return false;
        const Kind now = kind(e);
        const auto& packed = packs_[static_cast<int>(now.state)];
        return now.tier == Tier::near && std::find(packed.begin(), packed.end(), set(r_.first[e], e)) != packed.end();
    }

    // A page that stays goes to the set of its tokens.
    void retag(int e) {
        const pages::SetTag to = set(r_.first[e], e);
        r_.changes |= to != r_.tag[e];
        r_.tag[e] = to;
    }

    // Survivors of one entry, each to what it shall become.
    void collect(int e) {
        const Kind now = kind(e);
        const int32_t* const positions = pages::pool_of(pools_, row_.page[e]).positions(row_.page[e]);
        int i = r_.first[e];
        for (uint16_t m = row_.alive[e]; m; m &= m - 1, ++i) {
            const Kind next = wanted(i, now);
            if (next.state == State::evicted) continue;
            const int slot = std::countr_zero(m), state = static_cast<int>(next.state);
            const uint32_t note = row_.noted ? row_.note[static_cast<size_t>(e) * kSlots + slot] : 0;
            r_.to[static_cast<int>(next.tier)][state].push_back(
                {set(i, e), group(i), positions[slot], row_.page[e], slot, now.state, note});
            if (next.tier == Tier::near && group(i) < 0) packs(state, set(i, e));
        }
        r_.keep[e] = 0;
        r_.changes = true;
    }

    void packs(int state, pages::SetTag set) {
        auto& packed = packs_[state];
        if (std::find(packed.begin(), packed.end(), set) == packed.end()) packed.push_back(set);
    }

    // Evicted tokens of the tail, of Far pages and of the first ones leave their slots.
    void narrow(int e) {
        int i = r_.first[e];
        for (uint16_t m = r_.gone(e) ? uint16_t{0} : row_.alive[e]; m; m &= m - 1, ++i) {
            if (!plan_.state[i]) r_.keep[e] &= static_cast<uint16_t>(~(1u << std::countr_zero(m)));
        }
        r_.changes |= r_.keep[e] != row_.alive[e];
    }

    void paginate() {
        for (int tier = 0; tier < kTiers; ++tier) {
            for (int state = 1; state < kStates; ++state) {
                const auto& survivors = r_.to[tier][state];
                auto& pages = r_.pages[tier][state];
                for (int i = 0; i < static_cast<int>(survivors.size()); ++i) {
                    const Survivor& t = survivors[i];
                    const bool fresh = pages.empty() || pages.back().count == kSlots ||
                                       t.group != survivors[i - 1].group || t.set != pages.back().set;
                    if (fresh) pages.push_back({i, 0, want_of(t.group), t.set});
                    ++pages.back().count;
                }
            }
        }
    }

    const pages::Row& row_;
    const RowPlan& plan_;
    const int fixed_;
    pages::Pools& pools_;
    const Kind* const kinds_;
    std::vector<pages::SetTag> packs_[kStates];  // sets of ungrouped Near tokens
    Repack r_;
};

}  // namespace

Repack repack(const pages::Row& row, const RowPlan& plan, int most, int fixed, pages::Pools& pools, const Kind* kinds) {
    return Packing(row, plan, fixed, pools, kinds).run(most);
}

std::vector<uint8_t> reordered(const pages::Row& row, const RowPlan& plan, const Repack& r) {
    std::vector<uint8_t> out;
    out.reserve(row.stored);
    const auto stay = [&](int first, int end) {
        for (int e = first; e < end; ++e) {
            int i = r.first[e];
            for (uint16_t m = row.alive[e]; m; m &= m - 1, ++i) {
                if (r.keep[e] >> std::countr_zero(m) & 1) out.push_back(plan.state[i]);
            }
        }
    };
    stay(0, row.sealed);
    for (const auto& tier : r.to) {
        for (int s = 1; s < kStates; ++s) out.insert(out.end(), tier[s].size(), static_cast<uint8_t>(s));
    }
    stay(row.sealed, row.entries());
    return out;
}

}  // namespace kvstrata::store
