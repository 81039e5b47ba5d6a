#include "ops/attend.h"

#include <algorithm>

#include "cpu/attend_masks.h"
#include "cpu/attend_plan.h"
#include "cpu/attend_queries.h"
#include "cpu/isa.h"
#include "cpu/merge.h"
#include "cpu/parallel.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int64_t kAloneWork = 64;  // pages in all below which the caller works alone

// One unit of work: a chunk of a row's entries for all its query rows, or all entries for one tile of them.
// Query row n of a KV row is query n / G of head n % G: rows of one query are neighbours and share their masks.
class Unit {
  public:
    Unit(const ops::AttendParams& params, const Plan& plan, const Kernels& kernels, int unit, int worker)
        : p_(params),
          plan_(plan),
          kernels_(kernels),
          row_(params.rows[plan.row_of(unit)]),
          cut_(plan.row(plan.row_of(unit))),
          index_(unit - cut_.first_unit),
          s_(plan.scratch(worker)),
          stride_(padded_dim(params.head_dim)) {}

    void run() {
        const int rows = row_.queries * p_.group;
        if (cut_.split) {
            float* const acc = plan_.partial(cut_, index_, rows);
            const int begin = index_ * cut_.chunk, end = std::min(cut_.entries, begin + cut_.chunk);
            attend_rows(0, rows, begin, end, acc);
            normalise(rows, acc, plan_.partial_lse(cut_, index_, rows));
            if (cut_.left.fetch_sub(1, std::memory_order_acq_rel) == 1) merge_row(rows);
        } else {
            const int first = index_ * kTileRows, n = std::min(kTileRows, rows - first);
            attend_rows(first, n, 0, cut_.entries, s_.acc);
            normalise(n, s_.acc, s_.rescale);
            for (int i = 0; i < n; ++i) {
                const auto part = [&](int) {
                    return Partial{s_.acc + static_cast<int64_t>(i) * stride_, s_.rescale[i]};
                };
                write(first + i, 1, part);
            }
        }
        if (row_.logits && index_ == cut_.units - 1) clear_tail(rows);
    }

  private:
    int token(int n) const { return row_.tokens ? row_.tokens[n / p_.group] : n / p_.group; }
    float* logits(int n, int entry) const {
        const int64_t line = static_cast<int64_t>(n % p_.group) * row_.queries + n / p_.group;
        return row_.logits + (line * row_.entries + entry) * kSlots;
    }

    void load_queries(int first, int n) {
        const int bytes = dtype_bytes(p_.q_dtype);
        for (int i = 0; i < n; ++i) {
            const int64_t at = token(first + i) * row_.q_stride_t + (first + i) % p_.group * row_.q_stride_g;
            float* const q = s_.q + static_cast<int64_t>(i) * stride_;
            kernels_.convert(q, DType::f32, static_cast<const char*>(row_.q) + at * bytes, p_.q_dtype, p_.head_dim);
            std::fill(q + p_.head_dim, q + stride_, 0.0f);
        }
    }

    // Up to kBlock pages of a format that a row reads from `entry` on.
    void look_ahead(const ops::AttendRow& row, int entry, int end, Format format, PageBlock& block) const {
        int n = 0;
        for (int e = entry; e < end && n < kBlock; ++e) {
            if (!visible_slots(row, e)) continue;
            if (p_.pools[page_pool(row.pages[e])].format != format) break;
            block.ahead[n++] = page_at(p_.pools, row.pages[e]);
        }
        block.ahead[n] = nullptr;
    }

    // What comes after `entry`: more of this unit, or the unit that its thread will most likely do next.
    void look_ahead(int entry, int end, Format format, PageBlock& block) const {
        if (entry < end) return look_ahead(row_, entry, end, format, block);
        const int next = cut_.first_unit + index_ + 1;
        if (!cut_.split || next >= plan_.units()) return look_ahead(row_, 0, 0, format, block);
        const int r = plan_.row_of(next);
        const RowPlan& cut = plan_.row(r);
        look_ahead(p_.rows[r], (next - cut.first_unit) * cut.chunk, cut.entries, format, block);
    }

    // Before quantized pages: a unit pays for the rotation once it meets the first.
    void expect_quantized(AttendTile& tile, Format format) {
        tile.group = group_size(format, p_.head_dim);
        if (tile.acc_rotated) return;
        encode_queries(kernels_, tile, row_.centre);
        tile.acc_rotated = rotated_ = s_.acc_rotated;
        std::fill_n(rotated_, static_cast<int64_t>(tile.rows) * stride_, 0.0f);
    }

    // Running softmax of query rows [first, first + n) over entries [begin, end): acc, s_.maximum, s_.sum.
    void attend_rows(int first, int n, int begin, int end, float* acc) {
        load_queries(first, n);
        std::fill_n(acc, static_cast<int64_t>(n) * stride_, 0.0f);
        std::fill_n(s_.sum, n * kSlots, 0.0f);
        std::fill_n(s_.maximum, n, kMinusInf);
        AttendTile tile{s_.q,       acc,        s_.maximum, s_.sum, s_.z,        s_.p,    s_.rescale,
                        s_.live,    s_.decoded, s_.masks,   n,      p_.head_dim, stride_, p_.scale,
                        p_.softcap, nullptr,    s_.query,   0,      s_.operands};
        const int first_query = first / p_.group, last_query = (first + n - 1) / p_.group;
        MaskWalk walk(p_, row_, first_query, last_query - first_query + 1, begin);
        PageBlock block{};
        int entries[kBlock];
        Format format{};
        for (int e = begin; e < end; ++e) {
            if (!walk.next(e, s_.query_masks)) {
                for (int i = 0; row_.logits && i < n; ++i) std::fill_n(logits(first + i, e), kSlots, kMinusInf);
                continue;
            }
            const PageId id = row_.pages[e];
            const Format now = p_.pools[page_pool(id)].format;
            if (block.count == kBlock || (block.count && now != format))
                visit(tile, block, format, first, entries, e, end);
            format = now;
            const int j = block.count++;
            entries[j] = e;
            block.pages[j] = page_at(p_.pools, id);
            block.bias[j] = row_.bias ? row_.bias + static_cast<int64_t>(e) * kSlots : nullptr;
            for (int i = 0; i < n; ++i) s_.masks[i * kBlock + j] = s_.query_masks[(first + i) / p_.group - first_query];
        }
        if (block.count) visit(tile, block, format, first, entries, end, end);
    }

    // Adds a block to the tile of query rows from `first` on and empties it; `next` is the entry that comes after it.
    void visit(AttendTile& tile, PageBlock& block, Format format, int first, const int* entries, int next, int end) {
        look_ahead(next, end, format, block);
        if (!is_full(format)) expect_quantized(tile, format);
        add(tile, block, format);
        for (int i = 0; row_.logits && i < tile.rows; ++i) {
            for (int j = 0; j < block.count; ++j) {
                std::copy_n(tile.z + (i * kBlock + j) * kSlots, kSlots, logits(first + i, entries[j]));
            }
        }
        block.count = 0;
    }

    // By the level's matrix tiles, if it has any and the rows are enough for them.
    void add(const AttendTile& tile, const PageBlock& block, Format format) {
        const int f = static_cast<int>(format);
        if (tile.rows < kMatrixRows || !kernels_.attend_matrix[f]) return kernels_.attend_block[f](tile, block);
        bool& split = split_[is_full(format)];
        if (!split) kernels_.split_queries[f](tile);
        split = true;
        kernels_.attend_matrix[f](tile, block);
    }

    // acc to outputs, sums to log-sum-exps; what quantized pages gave is rotated back, once. A row that read nothing keeps
    // its zeros.
    void normalise(int n, float* acc, float* lse) {
        for (int i = 0; i < n; ++i) {
            float total = 0.0f;
            for (int lane = 0; lane < kSlots; ++lane) total += s_.sum[i * kSlots + lane];
            lse[i] = total == 0.0f ? kMinusInf : s_.maximum[i] + std::log(total);
            if (total == 0.0f) continue;
            if (rotated_) {
                float* const part = rotated_ + static_cast<int64_t>(i) * stride_;
                kernels_.rotate(part, p_.head_dim, true);
                kernels_.axpy(acc + static_cast<int64_t>(i) * stride_, part, 1.0f, p_.head_dim);
            }
            kernels_.divide(acc + static_cast<int64_t>(i) * stride_, total, stride_);
        }
    }

    void merge_row(int rows) {
        for (int n = 0; n < rows; ++n) {
            write(n, cut_.units, [&](int unit) {
                return Partial{plan_.partial(cut_, unit, rows) + static_cast<int64_t>(n) * stride_,
                               plan_.partial_lse(cut_, unit, rows)[n]};
            });
        }
    }

    // Merges the parts of query row n with its sink and writes out and lse.
    template <class At>
    void write(int n, int parts, At part) {
        alignas(64) float merged[kMaxHeadDim];
        const int head = n % p_.group;
        const float sink = row_.sinks ? row_.sinks[head] : kMinusInf;
        const float lse = combine(kernels_, parts, part, sink, merged, p_.head_dim);
        const int64_t at = token(n) * row_.out_stride_t + head * row_.out_stride_g;
        void* const out = static_cast<char*>(row_.out) + at * dtype_bytes(p_.out_dtype);
        kernels_.convert(out, p_.out_dtype, merged, DType::f32, p_.head_dim);
        if (row_.lse) row_.lse[token(n) * row_.lse_stride_t + head * row_.lse_stride_g] = lse;
    }

    // The logits of trailing -1 entries, which no unit visits.
    void clear_tail(int rows) {
        const int64_t tail = static_cast<int64_t>(row_.entries - cut_.entries) * kSlots;
        for (int n = 0; n < rows; ++n) std::fill_n(logits(n, cut_.entries), tail, kMinusInf);
    }

    const ops::AttendParams& p_;
    const Plan& plan_;
    const Kernels& kernels_;
    const ops::AttendRow& row_;
    RowPlan& cut_;
    const int index_;
    const Scratch s_;
    const int stride_;
    float* rotated_ = nullptr;  // the rotated accumulator, once there is a quantized page
    bool split_[2] = {};        // whether queries are in two terms: for quantized pages, for full ones
};

}  // namespace

int64_t attend_workspace_bytes(const ops::AttendParams& params) { return Plan::bytes(params, kernels().matrix); }

void attend(const ops::AttendParams& params) {
    if (!params.n_rows) return;
    const Kernels& k = kernels();
    const Plan plan(params, k.matrix);
    parallel(plan.units(), plan.work() < kAloneWork ? 1 : params.threads,
             [&](int64_t unit, int worker) { Unit(params, plan, k, static_cast<int>(unit), worker).run(); });
}

}  // namespace kvstrata::cpu
