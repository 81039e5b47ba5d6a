#include <algorithm>
#include <cmath>

#include "common/layout.h"
#include "cpu/best.h"
#include "cpu/cluster_keys.h"
#include "cpu/merge.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kLine = 16;  // keys side by side

// What a thread works in, for rows of up to n tokens.
struct Room {
    float *y, *lines, *norms, *s, *mean;
    int32_t* tokens;
    int64_t bytes;

    Room(int64_t n, int64_t dim, unsigned char* base) {
        const int64_t wide = (n + kLine - 1) / kLine * kLine;
        int64_t at = 0;
        const auto take = [&](int64_t count) {
            float* const to = reinterpret_cast<float*>(base + at);
            at += (4 * count + 63) / 64 * 64;
            return to;
        };
        y = take(n * dim), lines = take(wide * dim);
        norms = take(wide), s = take(wide), mean = take(dim);
        tokens = reinterpret_cast<int32_t*>(take(n));
        bytes = at;
    }
};

class Greedy {
  public:
    Greedy(ops::ClusterRow& row, int raw_dim, const Room& room)
        : row_(row), w_(room), dim_(padded_dim(raw_dim)), raw_dim_(raw_dim) {}

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

int64_t cluster_greedy_workspace_bytes(const ops::ClusterParams& p) {
    const int workers = std::max(1, std::min(p.threads, p.n_rows));
    return Room(longest_row(p), padded_dim(p.head_dim), nullptr).bytes * workers;
}

void cluster_greedy(const ops::ClusterParams& p) {
    const int64_t most = longest_row(p), dim = padded_dim(p.head_dim);
    parallel(p.n_rows, p.threads, [&](int64_t r, int worker) {
        const Room sized(most, dim, nullptr);
        const Room room(most, dim, static_cast<unsigned char*>(p.workspace) + worker * sized.bytes);
        Greedy(p.rows[r], p.head_dim, room).run();
    });
}

}  // namespace kvstrata::cpu
