#include "ops/choose_states.h"

#include <algorithm>
#include <bit>
#include <functional>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int kStates = 5;
constexpr uint8_t kEvicted = static_cast<uint8_t>(State::evicted), kFull = static_cast<uint8_t>(State::full);
constexpr int kDigit = 11;  // bits by which candidates are told apart in one pass: 8 KiB of counters
constexpr uint64_t kDigits = 1u << kDigit;
constexpr int64_t kFew = 256;  // candidates that are no longer worth clearing the counters for

struct Candidate {
    uint64_t key;
    int32_t place;
    uint8_t kind;
};
// Per token: its key, room for it as a candidate, its kind.
constexpr int64_t kTokenBytes = sizeof(uint64_t) + sizeof(Candidate) + 1;

int64_t worker_bytes(const ops::ChooseStatesParams& p) { return (p.tokens * kTokenBytes + 63) / 64 * 64; }

int64_t pages_of(int64_t tokens) { return (tokens + kSlots - 1) / kSlots; }

uint64_t key_of(uint64_t key) { return key; }
uint64_t key_of(const Candidate& c) { return c.key; }

// The digit in which candidates differ first: the highest bits above which all agree. False if all are equal.
template <class T>
bool first_digit(const T* c, int64_t n, int& shift) {
    uint64_t differ = 0;
    for (int64_t i = 0; i < n; ++i) differ |= key_of(c[i]) ^ key_of(c[0]);
    shift = std::max(0, static_cast<int>(std::bit_width(differ)) - kDigit);
    return differ != 0;
}

// Keeps the candidates of one digit, in their order. Returns how many.
template <class T>
int64_t keep_digit(T* c, int64_t n, int shift, uint64_t digit) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
        const T one = c[i];
        c[kept] = one;
        kept += (key_of(one) >> shift & (kDigits - 1)) == digit;
    }
    return kept;
}

struct Threshold {
    uint64_t key;   // what is above is taken,
    int64_t ties;   // and so many that are equal,
    int64_t equal;  // of so many
};

// The need-th largest of n keys, 1 <= need <= n. Reorders them.
Threshold threshold(uint64_t* keys, int64_t n, int64_t need) {
    int shift;
    while (n > kFew && first_digit(keys, n, shift)) {
        uint32_t count[kDigits] = {};
        for (int64_t i = 0; i < n; ++i) ++count[keys[i] >> shift & (kDigits - 1)];
        uint64_t digit = kDigits - 1;
        for (; need > count[digit]; --digit) need -= count[digit];
        n = keep_digit(keys, n, shift, digit);
    }
    std::nth_element(keys, keys + (need - 1), keys + n, std::greater<>());
    const uint64_t key = keys[need - 1];
    const int64_t above = std::count_if(keys, keys + n, [key](uint64_t other) { return other > key; });
    return {key, need - above, std::count(keys, keys + n, key)};
}

int64_t pages_of_all(const int64_t* counts) {
    int64_t pages = 0;
    for (int k = 0; k < kStates; ++k) pages += pages_of(counts[k]);
    return pages;
}

// Counts by kind of the longest run of candidates, by rank, that so many pages hold. All of them do not fit.
void longest_run(Candidate* c, int64_t n, int64_t pages, int64_t (&run)[kStates]) {
    std::fill_n(run, kStates, 0);
    int shift;
    while (n > kFew && first_digit(c, n, shift)) {
        uint32_t count[kDigits][kStates] = {};
        for (int64_t i = 0; i < n; ++i) ++count[c[i].key >> shift & (kDigits - 1)][c[i].kind];
        uint64_t digit = kDigits - 1;
        for (;; --digit) {  // digits that fit as a whole
            int64_t next[kStates];
            for (int k = 0; k < kStates; ++k) next[k] = run[k] + count[digit][k];
            if (pages_of_all(next) > pages) break;
            std::copy_n(next, kStates, run);
        }
        n = keep_digit(c, n, shift, digit);
    }
    std::sort(c, c + n, [](const Candidate& a, const Candidate& b) {
        return a.key != b.key ? a.key > b.key : a.place < b.place;
    });
    for (int64_t i = 0; i < n; ++i) {
        ++run[c[i].kind];
        if (pages_of_all(run) <= pages) continue;
        --run[c[i].kind];
        break;
    }
}

// Kinds up to `done` have their place; the others take their target as their kind.
void lower(uint8_t* __restrict kind, int n, uint8_t done, uint8_t quantized) {
    for (int i = 0; i < n; ++i) kind[i] = kind[i] <= done ? 0 : std::max(kind[i], quantized);
}

int64_t count_of(const uint8_t* kind, int n, uint8_t k) {
    constexpr int kBytes = 240;  // whose count is a byte
    int64_t count = 0;
    for (int first = 0; first < n; first += kBytes) {
        const int end = std::min(n, first + kBytes);
        uint8_t part = 0;
        for (int i = first; i < end; ++i) part += kind[i] == k;
        count += part;
    }
    return count;
}

// Keys of one kind, in order. Returns how many.
int64_t gather(const uint64_t* __restrict keys, const uint8_t* __restrict kind, int n, uint8_t k,
               uint64_t* __restrict mine) {
    int64_t count = 0;
    for (int i = 0; i < n; ++i) {
        mine[count] = keys[i];
        count += kind[i] == k;
    }
    return count;
}

// What has no place yet takes its kind as its state, or is Evicted.
void settle(const uint8_t* __restrict kind, int n, bool stays, uint8_t* __restrict out) {
    const uint8_t mask = stays ? 0xFF : 0;
    for (int i = 0; i < n; ++i) out[i] = kind[i] ? kind[i] & mask : out[i];
}

class Choice {
  public:
    Choice(const ops::ChooseStatesParams& params, int64_t row, int worker)
        : kernels_(kernels()),
          row_(params.rows[row]),
          n_(params.tokens),
          quantized_(static_cast<uint8_t>(params.quantized)) {
        unsigned char* const space = static_cast<unsigned char*>(params.workspace) + worker_bytes(params) * worker;
        candidates_ = reinterpret_cast<Candidate*>(space);
        keys_ = reinterpret_cast<uint64_t*>(candidates_ + n_);
        kind_ = reinterpret_cast<uint8_t*>(keys_ + n_);
    }

    void run() {
        kernels_.movable_states(row_.now, row_.positions, row_.protect, n_, kind_, row_.out);
        const int64_t full = count_of(kind_, n_, kFull), room = kSlots * std::min<int64_t>(row_.full_pages, n_);
        if (room < full && room > 0) take(kFull, full, room);
        lower(kind_, n_, room < full ? kEvicted : kFull, quantized_);
        quantize_rest();
    }

  private:
    void quantize_rest() {
        int64_t counts[kStates] = {};
        for (uint8_t k = quantized_; k < kStates; ++k) counts[k] = count_of(kind_, n_, k);
        const int64_t pages = row_.quant_pages;
        const bool fits = pages_of_all(counts) <= pages;
        if (fits || !pages) return settle(kind_, n_, fits, row_.out);
        int64_t run[kStates];
        if (std::count(counts, counts + kStates, 0) == kStates - 1) {
            std::fill_n(run, kStates, kSlots * pages);  // one kind
        } else {
            longest_run(candidates_, list_candidates(), pages, run);
        }
        for (uint8_t k = quantized_; k < kStates; ++k) {
            if (counts[k]) take(k, counts[k], kSlots * pages_of(run[k]));
        }
    }

    int64_t list_candidates() {
        need_keys();
        int64_t n = 0;
        for (int i = 0; i < n_; ++i) {
            candidates_[n] = {keys_[i], i, kind_[i]};
            n += kind_[i] != 0;
        }
        return n;
    }

    // The best `room` of so many tokens of a kind.
    void take(uint8_t k, int64_t count, int64_t room) {
        need_keys();
        if (room >= count) return mark(k, 0);
        if (room <= 0) return mark(k, ~uint64_t{0});  // above every key
        uint64_t* const mine = reinterpret_cast<uint64_t*>(candidates_);
        Threshold at = threshold(mine, gather(keys_, kind_, n_, k, mine), room);
        mark(k, at.ties == at.equal ? at.key : at.key + 1);
        // Tokens of one score and one position: the first of them.
        for (int i = 0; at.ties < at.equal && at.ties > 0 && i < n_; ++i) {
            if (kind_[i] != k || keys_[i] != at.key) continue;
            row_.out[i] = k;
            kind_[i] = 0;
            --at.ties, --at.equal;
        }
    }

    // Tokens of a kind with at least this key get it as their state and are done; its others are Evicted so far.
    void mark(uint8_t k, uint64_t least) { kernels_.mark_ranked(keys_, n_, least, k, kind_, row_.out); }

    void need_keys() {
        if (!keyed_) kernels_.rank_keys(row_.score, row_.positions, n_, keys_);
        keyed_ = true;
    }

    const Kernels& kernels_;
    const ops::ChooseStatesRow& row_;
    const int n_;
    const uint8_t quantized_;
    Candidate* candidates_;
    uint64_t* keys_;
    uint8_t* kind_;
    bool keyed_ = false;
};

}  // namespace

int64_t choose_states_workspace_bytes(const ops::ChooseStatesParams& p) {
    return worker_bytes(p) * std::max(1, p.threads);
}

void choose_states(const ops::ChooseStatesParams& p) {
    parallel(p.n_rows, p.threads, [&](int64_t row, int worker) { Choice(p, row, worker).run(); });
}

}  // namespace kvstrata::cpu
