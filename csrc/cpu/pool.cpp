#include "ops/pool.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

struct Token {
    int32_t position;
    int32_t place;  // entry * 16 + slot
};
constexpr int64_t kTokenBytes = sizeof(Token) + sizeof(float);

int64_t worker_bytes(const ops::PoolParams& p) {
    int64_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) most = std::max<int64_t>(most, p.rows[r].entries);
    return (most * kSlots * kTokenBytes + 63) / 64 * 64;
}

bool earlier(const Token& a, const Token& b) {
    return a.position != b.position ? a.position < b.position : a.place < b.place;
}

// One row: its tokens in order of position, then head by head.
class Pooling {
  public:
    Pooling(const ops::PoolParams& params, int row, int worker)
        : p_(params),
          row_(params.rows[row]),
          tokens_(
              reinterpret_cast<Token*>(static_cast<unsigned char*>(params.workspace) + worker_bytes(params) * worker)),
          values_(reinterpret_cast<float*>(tokens_ + static_cast<int64_t>(row_.entries) * kSlots)) {}

    void run() {
        collect();
        std::fill_n(row_.out, static_cast<int64_t>(row_.entries) * kSlots, 0.0f);
        for (int g = 0; g < p_.group; ++g) {
            const float* const score = row_.score + g * row_.score_stride_g;
            for (int i = 0; i < count_; ++i) values_[i] = score[tokens_[i].place];
            pool();
        }
        for (int i = 0; i < count_; ++i) row_.out[tokens_[i].place] /= static_cast<float>(p_.group);
    }

  private:
    void collect() {
        bool ordered = true;
        for (int e = 0; e < row_.entries; ++e) {
            const PageId id = row_.pages[e];
            unsigned slots = id < 0 ? 0u : row_.visible ? row_.visible[e] : kAllSlots;
            if (!slots) continue;
            const int32_t* const positions = p_.pools[page_pool(id)].positions[page_slab(id)] + page_index(id) * kSlots;
            for (; slots; slots &= slots - 1) {
                const int slot = __builtin_ctz(slots);
                tokens_[count_] = {positions[slot], e * kSlots + slot};
                ordered = ordered && (count_ == 0 || tokens_[count_ - 1].position <= positions[slot]);
                ++count_;
            }
        }
        if (!ordered) std::sort(tokens_, tokens_ + count_, earlier);
    }

    // Adds the pooled values of one head to out.
    void pool() {
        const int64_t reach = p_.kernel / 2;
        int first = 0, end = 0;
        for (int i = 0; i < count_; ++i) {
            const int64_t here = tokens_[i].position;
            while (tokens_[first].position < here - reach) ++first;
            while (end < count_ && tokens_[end].position <= here + reach) ++end;
            row_.out[tokens_[i].place] += p_.kind == ops::PoolKind::max ? most(first, end) : average(first, end);
        }
    }

    float average(int first, int end) const {
        float total = 0.0f;
        for (int j = first; j < end; ++j) total += values_[j];
        return total / static_cast<float>(p_.divide == ops::PoolDivide::present ? end - first : p_.kernel);
    }

    float most(int first, int end) const {
        float m = values_[first];
        for (int j = first + 1; j < end; ++j) {
            if (values_[j] > m || values_[j] != values_[j]) m = values_[j];
        }
        return m;
    }

    const ops::PoolParams& p_;
    const ops::PoolRow& row_;
    Token* const tokens_;
    float* const values_;
    int count_ = 0;
};

}  // namespace

int64_t pool_workspace_bytes(const ops::PoolParams& p) { return worker_bytes(p) * std::max(1, p.threads); }

void pool(const ops::PoolParams& p) {
    parallel(p.n_rows, p.threads, [&](int64_t row, int worker) { Pooling(p, static_cast<int>(row), worker).run(); });
}

}  // namespace kvstrata::cpu
