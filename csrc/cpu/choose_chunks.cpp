#include "ops/choose_chunks.h"

#include <algorithm>
#include <limits>

#include "cpu/radix_sort.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kBisections = 64;
constexpr double kAbove = 1 + 1.0 / (1 << 20);  // of the largest density: nothing is worth that

// An item whose step differs between the two ends of the bisection.
struct Open {
    int32_t item;
    uint8_t low, high, middle;  // its step at either end (high: of lambda, so the lower step) and between them
};

// What a step up of a ladder costs and is worth.
struct Rise {
    double worth;
    double price_f64;
    int64_t price;
};

class Ladders {
  public:
    Ladders(const ops::ChooseChunksParams& params, Rise* rises) : p_(params), rises_(params.steps - 1), table_(rises) {
        for (int f = 0; f < p_.ladders; ++f) {
            for (int j = 0; j < rises_; ++j) {
                const int below = j * p_.ladders + f, above = below + p_.ladders;
                const int64_t price = p_.cost[above] - p_.cost[below];
                const double worth = static_cast<double>(p_.fidelity[above]) - static_cast<double>(p_.fidelity[below]);
                table_[f * rises_ + j] = {worth, static_cast<double>(price), price};
            }
        }
    }

    int rises() const { return rises_; }
    int64_t cost(int item, int j) const { return p_.cost[j * p_.ladders + p_.ladder[item]]; }
    int64_t price(int item, int j) const { return of(p_.ladder[item])[j].price; }
    double density(int item, int j) const {
        const Rise& rise = of(p_.ladder[item])[j];
        return static_cast<double>(p_.w[item]) * rise.worth / rise.price_f64;
    }

    // The item's step at a level, known to be in low..high.
    int chosen(int item, double level, int low, int high) const {
        const Rise* const rises = of(p_.ladder[item]);
        const double w = p_.w[item];
        int j = low;
        while (j < high && w * rises[j].worth > level * rises[j].price_f64) ++j;
        return j;
    }
    int chosen(int item, double level) const { return chosen(item, level, 0, rises_); }

    // The largest density of all: rounding keeps the order of w, so that the ends of each ladder's items have it.
    double densest() const {
        double most = 0.0;
        float least_w[256], most_w[256];
        std::fill_n(least_w, 256, std::numeric_limits<float>::infinity());
        std::fill_n(most_w, 256, -1.0f);  // no item
        for (int i = 0; i < p_.items; ++i) {
            float &low = least_w[p_.ladder[i]], &high = most_w[p_.ladder[i]];
            low = std::min(low, p_.w[i]), high = std::max(high, p_.w[i]);
        }
        for (int f = 0; f < p_.ladders; ++f) {
            for (int j = 0; j < rises_ && most_w[f] >= 0 && of(f)[j].price > 0; ++j) {
                const double w = of(f)[j].worth > 0 ? most_w[f] : least_w[f];
                most = std::max(most, w * of(f)[j].worth / of(f)[j].price_f64);
            }
        }
        return most;
    }

    int64_t cheapest_rise() const {
        int64_t least = std::numeric_limits<int64_t>::max();
        for (int k = 0; k < rises_ * p_.ladders; ++k) {
            if (table_[k].price > 0) least = std::min(least, table_[k].price);
        }
        return least;
    }

  private:
    const Rise* of(int ladder) const { return table_ + ladder * rises_; }

    const ops::ChooseChunksParams& p_;
    const int rises_;
    Rise* const table_;  // [F, J - 1]
};

// Lambda, with p.step and p.held as it chooses. An item's step falls as lambda rises: where it is the same at both ends of
// the bisection it is so between them, and the item need not be asked again.
double bisect(const ops::ChooseChunksParams& p, const Ladders& ladders, Open* open) {
    int64_t cheap = 0, dear = 0;  // costs at either end
    const double most = ladders.densest() * kAbove;
    int n = 0;
    for (int i = 0; i < p.items; ++i) {
        const int low = ladders.chosen(i, 0.0), high = ladders.chosen(i, most);
        p.step[i] = static_cast<uint8_t>(low);
        open[n] = {i, static_cast<uint8_t>(low), static_cast<uint8_t>(high), 0};
        n += low != high;
        dear += ladders.cost(i, low), cheap += ladders.cost(i, high);
    }
    *p.held = dear;
    if (dear <= p.budget) return 0.0;
    int64_t closed = cheap;  // of the items that are not open, at their step
    for (int k = 0; k < n; ++k) closed -= ladders.cost(open[k].item, open[k].high);
    double low = 0.0, level = most;
    for (int round = 0; round < kBisections; ++round) {
        const double middle = (low + level) / 2;
        int64_t held = closed;
        for (int k = 0; k < n; ++k) {
            open[k].middle = static_cast<uint8_t>(ladders.chosen(open[k].item, middle, open[k].high, open[k].low));
            held += ladders.cost(open[k].item, open[k].middle);
        }
        const bool fits = held <= p.budget;
        (fits ? level : low) = middle;
        int kept = 0;
        for (int k = 0; k < n; ++k) {
            Open one = open[k];
            (fits ? one.high : one.low) = one.middle;
            open[kept] = one;
            if (one.low != one.high) {
                ++kept;
            } else {
                p.step[one.item] = one.high;
                closed += ladders.cost(one.item, one.high);
            }
        }
        n = kept;
    }
    for (int k = 0; k < n; ++k) {
        p.step[open[k].item] = open[k].high;
        closed += ladders.cost(open[k].item, open[k].high);
    }
    *p.held = closed;
    return level;
}

// Further steps by falling density. What does not fit once never does, nor what lies above it.
void fill(const ops::ChooseChunksParams& p, const Ladders& ladders, Keyed* steps) {
    int64_t room = p.budget - *p.held, n = 0;
    const int64_t cheapest = ladders.cheapest_rise();
    if (room < cheapest) return;
    for (int i = 0; i < p.items; ++i) {
        double density = std::numeric_limits<double>::infinity();
        for (int j = 0; j < ladders.rises(); ++j) {
            const int64_t price = ladders.price(i, j);
            if (price <= 0 || (j >= p.step[i] && price > room)) break;
            // Rounding must not put a step before the one below it.
            density = std::min(density, ladders.density(i, j));
            if (j >= p.step[i]) steps[n++] = {~ordered(density), i, j};
        }
    }
    const Keyed* const sorted = radix_sort(steps, steps + n, n);
    for (int64_t k = 0; k < n && room >= cheapest; ++k) {
        const int item = sorted[k].item, j = sorted[k].part;
        const int64_t price = ladders.price(item, j);
        if (p.step[item] != j || price > room) continue;
        p.step[item] = static_cast<uint8_t>(j + 1);
        room -= price;
    }
    *p.held = p.budget - room;
}

}  // namespace

static int64_t table_bytes(const ops::ChooseChunksParams& p) {
    return (p.steps - 1) * p.ladders * static_cast<int64_t>(sizeof(Rise));
}

int64_t choose_chunks_workspace_bytes(const ops::ChooseChunksParams& p) {
    return table_bytes(p) + p.items * 2 * static_cast<int64_t>(sizeof(Keyed)) * std::max(1, p.steps - 1);
}

void choose_chunks(const ops::ChooseChunksParams& p) {
    const Ladders ladders(p, static_cast<Rise*>(p.workspace));
    void* const rest = static_cast<unsigned char*>(p.workspace) + table_bytes(p);
    *p.level = bisect(p, ladders, static_cast<Open*>(rest));
    fill(p, ladders, static_cast<Keyed*>(rest));
}

}  // namespace kvstrata::cpu
