#include "ops/cluster.h"

#include <algorithm>
#include <cmath>

#include "common/layout.h"
#include "cpu/cluster_keys.h"
#include "cpu/merge.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kLine = 16;                   // centroids side by side
constexpr int kRanks = 4, kLateRounds = 8;  // rounds of bids by rank, and for what has room

struct Bid {
    float priority;
    int32_t page, token;
};
// By page, then the order in which a page takes them.
bool before(const Bid& a, const Bid& b) {
    if (a.page != b.page) return a.page < b.page;
    return a.priority != b.priority ? a.priority > b.priority : a.token < b.token;
}

class Clustering {
  public:
    // What a thread works in, for rows of up to n tokens.
    struct Room {
        float *y, *z, *lines, *s, *line, *sums;
        Bid* bids;
        int32_t *tokens, *ranked, *seats;
        uint8_t* moved;
        int64_t bytes;

        Room(int64_t n, int64_t dim, void* base) {
            const int64_t pages = (n + kSlots - 1) / kSlots, wide = (pages + kLine - 1) / kLine * kLine;
            Places places(base);
            y = places.take<float>(n * dim);
            z = places.take<float>(pages * dim);
            lines = places.take<float>(wide * dim);
            s = places.take<float>(n * wide);
            line = places.take<float>(wide);
            sums = places.take<float>(pages * dim);
            bids = places.take<Bid>(n);
            tokens = places.take<int32_t>(n);
            ranked = places.take<int32_t>(n * (kRanks + 1));
            seats = places.take<int32_t>(pages);
            moved = places.take<uint8_t>(pages);
            bytes = places.bytes();
        }
    };

    Clustering(const ops::ClusterParams& params, ops::ClusterRow& row, const Room& room)
        : row_(row), w_(room), dim_(padded_dim(params.head_dim)), raw_dim_(params.head_dim), iters_(params.iters) {}

    void run() {
        n_ = find_live(row_, w_.tokens);
        pages_ = row_.pages;
        wide_ = (pages_ + kLine - 1) / kLine * kLine;
        if (n_ == 0) return;
        centre_keys(k_, row_, w_.tokens, n_, raw_dim_, w_.y, w_.sums);
        seed();
        for (int i = 0; i < iters_; ++i) {
            compare();
            move();
        }
        compare();
        seat();
    }

  private:
    float* y(int i) const { return w_.y + static_cast<int64_t>(i) * dim_; }
    float* z(int j) const { return w_.z + static_cast<int64_t>(j) * dim_; }
    float* s(int i) const { return w_.s + static_cast<int64_t>(i) * wide_; }
    int32_t& page_of(int i) const { return row_.page_of[w_.tokens[i]]; }

    // x / |x|; false and as it was where there is no direction.
    bool unit(float* x) const {
        const float length = std::sqrt(k_.dot_product(x, x, dim_));
        if (!(length > 0.0f) || !std::isfinite(length)) return false;
        k_.divide(x, length, dim_);
        return true;
    }

    void seed() {
        for (int64_t j = 0; j < pages_; ++j) {
            std::copy_n(y(static_cast<int>((2 * j + 1) * n_ / (2 * pages_))), dim_, z(static_cast<int>(j)));
            unit(z(static_cast<int>(j)));
        }
    }

    // Every token with every centroid.
    void compare() {
        for (int j = 0; j < wide_; ++j) {
            float* const line = w_.lines + static_cast<int64_t>(j / kLine) * dim_ * kLine + j % kLine;
            for (int d = 0; d < dim_; ++d) line[static_cast<int64_t>(d) * kLine] = j < pages_ ? z(j)[d] : 0.0f;
        }
        k_.cluster_dots(w_.y, n_, w_.lines, wide_ / kLine, dim_, w_.s, wide_);
        for (int i = 0; pages_ < wide_ && i < n_; ++i) std::fill(s(i) + pages_, s(i) + wide_, kMinusInf);
    }

    int nearest(const float* s) const { return std::min(k_.first_largest(s, wide_), pages_ - 1); }

    // Each centroid to the direction of those that are nearest to it.
    void move() {
        std::fill_n(w_.sums, static_cast<int64_t>(pages_) * dim_, 0.0f);
        std::fill_n(w_.moved, pages_, uint8_t{0});
        for (int i = 0; i < n_; ++i) {
            const int j = nearest(s(i));
            k_.axpy(w_.sums + static_cast<int64_t>(j) * dim_, y(i), 1.0f, dim_);
            w_.moved[j] = 1;
        }
        for (int j = 0; j < pages_; ++j) {
            float* const sum = w_.sums + static_cast<int64_t>(j) * dim_;
            if (w_.moved[j] && unit(sum)) std::copy_n(sum, dim_, z(j));
        }
    }

    // Exactly 16 to a page.
    void seat() {
        std::fill_n(w_.seats, pages_, kSlots);
        rank();
        const int rounds = std::min(kRanks, pages_);
        for (int c = 0; c < rounds; ++c) {
            bid([&](int i) {
                const int32_t* const best = w_.ranked + static_cast<int64_t>(i) * (kRanks + 1);
                const float gap = c + 1 < pages_ ? s(i)[best[c]] - s(i)[best[c + 1]] : 0.0f;
                return Bid{gap, best[c], i};
            });
        }
        for (int round = 0; round < kLateRounds && left_ > 0; ++round) {
            bid([&](int i) {
                const int j = roomiest(i);
                return Bid{s(i)[j], j, i};
            });
        }
        for (int i = 0, j = 0; left_ > 0 && i < n_; ++i) {
            if (page_of(i) >= 0) continue;
            while (w_.seats[j] == 0) ++j;
            take(i, j);
        }
    }

    // The five best pages of every token.
    void rank() {
        left_ = n_;
        const int ranks = std::min(kRanks + 1, pages_);
        for (int i = 0; i < n_; ++i) {
            std::copy_n(s(i), wide_, w_.line);
            int32_t* const best = w_.ranked + static_cast<int64_t>(i) * (kRanks + 1);
            for (int c = 0; c < ranks; ++c) {
                best[c] = nearest(w_.line);
                w_.line[best[c]] = kMinusInf;
            }
        }
    }

    // The best page with room.
    int roomiest(int i) const {
        int best = -1;
        for (int j = 0; j < pages_; ++j) {
            if (w_.seats[j] && (best < 0 || s(i)[j] > s(i)[best])) best = j;
        }
        return best;
    }

    template <class Wish>
    void bid(Wish wish) {
        int count = 0;
        for (int i = 0; i < n_; ++i) {
            if (page_of(i) < 0) w_.bids[count++] = wish(i);
        }
        for (int b = 0; b < count; ++b) {
            if (std::isnan(w_.bids[b].priority)) w_.bids[b].priority = kMinusInf;  // an order needs numbers
        }
        std::sort(w_.bids, w_.bids + count, before);
        for (int b = 0; b < count; ++b) {
            if (w_.seats[w_.bids[b].page]) take(w_.bids[b].token, w_.bids[b].page);
        }
    }

    void take(int i, int j) {
        page_of(i) = j;
        --w_.seats[j];
        --left_;
    }

    ops::ClusterRow& row_;
    const Room& w_;
    const Kernels& k_ = kernels();
    const int dim_, raw_dim_, iters_;
    int n_ = 0, pages_ = 0, wide_ = 0, left_ = 0;
};

}  // namespace

int64_t cluster_workspace_bytes(const ops::ClusterParams& p) { return workspace_bytes<Clustering>(p); }
void cluster(const ops::ClusterParams& p) { cluster_rows<Clustering>(p); }

}  // namespace kvstrata::cpu
