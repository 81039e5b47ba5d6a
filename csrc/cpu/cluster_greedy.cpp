#include <algorithm>
#include <cmath>

#include "common/layout.h"
#include "cpu/best.h"
#include "cpu/cluster_keys.h"
#include "cpu/merge.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kLine = 16;  // keys side by side

class Greedy {
  public:
    // What a thread works in, for rows of up to n tokens.
    struct Room {
        float *y, *lines, *norms, *s, *mean;
        int32_t* tokens;
        int64_t bytes;

        Room(int64_t n, int64_t dim, void* base) {
            const int64_t wide = (n + kLine - 1) / kLine * kLine;
            Places places(base);
            y = places.take<float>(n * dim), lines = places.take<float>(wide * dim);
            norms = places.take<float>(wide), s = places.take<float>(wide), mean = places.take<float>(dim);
            tokens = places.take<int32_t>(n);
            bytes = places.bytes();
        }
    };

    Greedy(const ops::ClusterParams& params, ops::ClusterRow& row, const Room& room)
        : row_(row), w_(room), dim_(padded_dim(params.head_dim)), raw_dim_(params.head_dim) {}

    void run() {
        n_ = find_live(row_, w_.tokens);
        wide_ = (n_ + kLine - 1) / kLine * kLine;
        if (n_ == 0) return;
        centre_keys(k_, row_, w_.tokens, n_, raw_dim_, w_.y, w_.mean);
        arrange();
        for (int page = 0; page < row_.pages; ++page) fill(page);
    }

  private:
    const float* y(int i) const { return w_.y + static_cast<int64_t>(i) * dim_; }

    // Sixteen keys side by side, and |y|^2 of those to be placed: -inf for the others.
    void arrange() {
        for (int i = 0; i < wide_; ++i) {
            float* const line = w_.lines + static_cast<int64_t>(i / kLine) * dim_ * kLine + i % kLine;
            for (int d = 0; d < dim_; ++d) line[static_cast<int64_t>(d) * kLine] = i < n_ ? y(i)[d] : 0.0f;
            const float norm = i < n_ ? k_.dot_product(y(i), y(i), dim_) : kMinusInf;
            w_.norms[i] = std::isnan(norm) ? 0.0f : norm;  // it lands somewhere
        }
    }

    void fill(int page) {
        const int seed = k_.first_largest(w_.norms, wide_);
        k_.cluster_dots(y(seed), 1, w_.lines, wide_ / kLine, dim_, w_.s, wide_);
        place(seed, page);
        for (int i = 0; i < wide_; ++i) {
            if (w_.norms[i] == kMinusInf) w_.s[i] = kMinusInf;
        }
        int32_t best[kSlots - 1];
        int count = keep_best(k_, w_.s, wide_, kMinusInf, kSlots - 1, best);
        for (int i = 0; i < count; ++i) place(best[i], page);
        for (int i = 0; count < kSlots - 1 && i < n_; ++i) {  // products that are no numbers
            if (w_.norms[i] != kMinusInf) place(i, page), ++count;
        }
    }

    void place(int i, int page) {
        row_.page_of[w_.tokens[i]] = page;
        w_.norms[i] = kMinusInf;
    }

    ops::ClusterRow& row_;
    const Room& w_;
    const Kernels& k_ = kernels();
    const int dim_, raw_dim_;
    int n_ = 0, wide_ = 0;
};

}  // namespace

int64_t cluster_greedy_workspace_bytes(const ops::ClusterParams& p) { return workspace_bytes<Greedy>(p); }
void cluster_greedy(const ops::ClusterParams& p) { cluster_rows<Greedy>(p); }

}  // namespace kvstrata::cpu
