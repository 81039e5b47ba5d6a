#include "ops/pool.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

struct Token {
    int32_t position;
    int32_t place;  // entry * 16 + slot
};
constexpr int kNear = 32;  // neighbours on a side up to which each is looked at
constexpr int kPad = 64;   // bytes in tokens' arrays beyond the last, and before the first value

struct Room {  // of one worker, for rows of up to n tokens
    Token *tokens, *spare;
    float *values, *before, *after, *sums;
};
// Where a worker's arrays lie from `base` on; returns their bytes.
int64_t lay_out(int64_t n, unsigned char* base, Room& room) {
    int64_t at = 0;
    const auto take = [&](auto*& to, int64_t bytes, int64_t ahead) {
        to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(base + at + ahead);
        at += (bytes + ahead + kPad + 63) / 64 * 64;
    };
    const int64_t around = static_cast<int64_t>(kNear * sizeof(float));
    take(room.tokens, n * static_cast<int64_t>(sizeof(Token)), 0);
    take(room.spare, n * static_cast<int64_t>(sizeof(Token)), 0);
    take(room.values, n * 4 + around, around);
    take(room.before, n * 4, 0);
    take(room.after, n * 4, 0);
    take(room.sums, n * 4, 0);
    return at;
}
int64_t worker_bytes(const ops::PoolParams& p) {
    int64_t most = 0;
    for (int r = 0; r < p.n_rows; ++r) most = std::max<int64_t>(most, p.rows[r].entries);
    Room none{};
    return lay_out(most * kSlots, nullptr, none);
}

bool earlier(const Token& a, const Token& b) { return a.position < b.position; }  // equal ones keep their order

// Merges the runs that are in order already, pair by pair: a row's tokens are mostly a few of them.
Token* sorted(Token* tokens, Token* spare, int n) {
    for (bool whole = false; !whole; std::swap(tokens, spare)) {
        whole = true;
        for (int first = 0; first < n;) {
            Token* const begin = tokens + first;
            Token* const middle = std::is_sorted_until(begin, tokens + n, earlier);
            Token* const end = std::is_sorted_until(middle, tokens + n, earlier);
            std::merge(begin, middle, middle, end, spare + first, earlier);
            whole = whole && begin == tokens && end == tokens + n;
            first = static_cast<int>(end - tokens);
        }
    }
    return tokens;
}

// One row: its tokens in order of position, then head by head.
class Pooling {
  public:
    Pooling(const ops::PoolParams& params, const Kernels& kernels, int row, int worker)
        : p_(params), kernels_(kernels), row_(params.rows[row]) {
        lay_out(static_cast<int64_t>(row_.entries) * kSlots,
                static_cast<unsigned char*>(params.workspace) + worker_bytes(params) * worker, room_);
    }

    void run() {
        collect();
        find_neighbours();
        std::fill_n(row_.out, static_cast<int64_t>(row_.entries) * kSlots, 0.0f);
        std::fill_n(room_.sums, count_, 0.0f);
        for (int g = 0; g < p_.group; ++g) {
            const float* const score = row_.score + g * row_.score_stride_g;
            for (int i = 0; i < count_; ++i) room_.values[i] = score[tokens_[i].place];
            pool();
        }
        for (int i = 0; i < count_; ++i) row_.out[tokens_[i].place] = room_.sums[i] / static_cast<float>(p_.group);
    }

  private:
    void collect() {
        bool ordered = true;
        tokens_ = room_.tokens;
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
        if (!ordered) tokens_ = sorted(tokens_, room_.spare, count_);
    }

    void find_neighbours() {
        const int64_t reach = p_.kernel / 2;
        for (int i = 0, first = 0, end = 0; i < count_; ++i) {
            const int64_t here = tokens_[i].position;
            while (tokens_[first].position < here - reach) ++first;
            while (end < count_ && tokens_[end].position <= here + reach) ++end;
            room_.before[i] = static_cast<float>(i - first), room_.after[i] = static_cast<float>(end - 1 - i);
            most_ = std::max(most_, std::max(i - first, end - 1 - i));
        }
    }

    // Adds the pooled values of one head to the sums.
    void pool() {
        const bool max = p_.kind == ops::PoolKind::max, present = p_.divide == ops::PoolDivide::present;
        const Room& m = room_;
        if (most_ > kNear) {
            max ? slide() : average();
        } else if (max) {
            kernels_.pool_max(m.values, m.before, m.after, count_, most_, m.sums);
        } else {
            const float divisor = present ? 0.0f : static_cast<float>(p_.kernel);
            kernels_.pool_average(m.values, m.before, m.after, count_, most_, divisor, m.sums);
        }
    }

    int first_of(int i) const { return i - static_cast<int>(room_.before[i]); }
    int end_of(int i) const { return i + static_cast<int>(room_.after[i]) + 1; }

    void average() {
        for (int i = 0; i < count_; ++i) {
            float total = 0.0f;
            for (int j = first_of(i); j < end_of(i); ++j) total += room_.values[j];
            const bool present = p_.divide == ops::PoolDivide::present;
            room_.sums[i] += total / static_cast<float>(present ? end_of(i) - first_of(i) : p_.kernel);
        }
    }

    // The largest of a sliding window: a queue of tokens each of which is beaten by none after it. A NaN beats all.
    void slide() {
        Token* const queue = tokens_ == room_.tokens ? room_.spare : room_.tokens;
        int head = 0, tail = 0, end = 0;
        for (int i = 0; i < count_; ++i) {
            for (; end < end_of(i); ++end) {
                const float now = room_.values[end];
                while (tail > head && !(room_.values[queue[tail - 1].place] > now) &&
                       room_.values[queue[tail - 1].place] == room_.values[queue[tail - 1].place]) {
                    --tail;
                }
                // behind a NaN only another one matters, once the first has left the window
                while (tail > head && now != now) --tail;
                queue[tail++].place = end;
            }
            while (queue[head].place < first_of(i)) ++head;
            room_.sums[i] += room_.values[queue[head].place];
        }
    }

    const ops::PoolParams& p_;
    const Kernels& kernels_;
    const ops::PoolRow& row_;
    Room room_{};
    Token* tokens_ = nullptr;
    int count_ = 0;
    int most_ = 0;  // neighbours on one side of a token
};

}  // namespace

int64_t pool_workspace_bytes(const ops::PoolParams& p) { return worker_bytes(p) * std::max(1, p.threads); }

void pool(const ops::PoolParams& p) {
    const Kernels& k = kernels();
    parallel(p.n_rows, p.threads, [&](int64_t row, int worker) { Pooling(p, k, static_cast<int>(row), worker).run(); });
}

}  // namespace kvstrata::cpu
