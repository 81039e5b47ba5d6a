// The step of a store: tokens of some sequences go through the layers, then all of it stands or none.
#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "common/fault.h"
#include "common/layout.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

const void* at(const TokenTensor& t, DType dtype, int64_t sequence, int64_t head) {
    return static_cast<const unsigned char*>(t.data) + (sequence * t.batch + head * t.head) * dtype_bytes(dtype);
}

}  // namespace

// starts [B + 1]: sequence b feeds tokens[starts[b] .. starts[b + 1]), each the index of one real token along the T axis
// of the tensors to come (padding is named by nobody).
void Store::begin(std::span<const SeqId> seqs, std::span<const int32_t> starts, std::span<const int32_t> tokens) {
    check(!open_, "begin: a step is open already, expected none");
    check(!seqs.empty(), "begin: seqs is empty, expected at least one sequence");
    check_sequences(seqs, "begin");
    check(starts.size() == seqs.size() + 1, "begin: starts has ", starts.size(), " elements, expected ",
          seqs.size() + 1);
    check(starts[0] == 0 && starts.back() == static_cast<int32_t>(tokens.size()), "begin: starts spans ", starts[0],
          "..", starts.back(), ", expected 0..", tokens.size());
    check(std::is_sorted(starts.begin(), starts.end()), "begin: starts decreases");
    check(!tokens.empty(), "begin: the step has no token, expected at least one");
    step_.clear();
    tokens_.assign(tokens.begin(), tokens.end());
    token_pos_.resize(tokens.size());
    done_.assign(layers_.size(), 0);
    if (options_.queries > 0) staged_.resize(seqs.size() * layers_.size());
    for (QueryRing& ring : staged_) ring.restart();
    if (options_.massed) staged_mass_.resize(seqs.size() * n_rows_);
    for (auto& mass : staged_mass_) mass.clear();
    for (size_t b = 0; b < seqs.size(); ++b) {
        Sequence& s = find(seqs[b], "begin");
        const int32_t count = starts[b + 1] - starts[b];
        check(s.length + count <= INT32_MAX, "begin: sequence ", seqs[b], " would pass ", INT32_MAX, " tokens");
        for (int32_t t = 0; t < count; ++t) token_pos_[starts[b] + t] = static_cast<int32_t>(s.length + t);
        step_.push_back({seqs[b], &s, starts[b], count});
    }
    laid_ = false;
    longest_ = 0;
    chosen_.layer = -1;
    for (const StepSequence& s : step_) longest_ = std::max(longest_, s.count);
    open_ = true;
}

std::vector<int64_t> Store::needed(int first_layer, int last_layer, int from, int to) {
    check(open_, "needed: no step is open");
    check(first_layer >= 0 && first_layer <= last_layer && last_layer <= static_cast<int>(layers_.size()),
          "needed: layers are ", first_layer, "..", last_layer, ", expected within 0..", layers_.size());
    std::vector<int64_t> need(pools_.size(), 0);
    for (int l = first_layer; l < last_layer; ++l) {
        pages::Pool& pool = pools_[layer_pool_[l]];
        for (const StepSequence& s : step_) {
            const int64_t n = std::min(to, s.count) - std::min(from, s.count);
            for (int h = 0; h < layers_[l].kv_heads; ++h) {
                const pages::Row& row = row_of(*s.sequence, l, h);
                need[layer_pool_[l]] += pages::pages_needed(row, n, pool);
                if (!options_.far.empty() && recalls(l) && longest_ == 1 && n > 0) {
                    need[pool_of(l, options_.far[0])] += pages::pages_needed(
                        row.near, std::min(row.sealed, options_.recall.widest()), options_.recall.near_pages);
                }
            }
        }
    }
    return need;
}

std::vector<int64_t> Store::missing(int first_layer, int last_layer, int from, int to) {
    std::vector<int64_t> need = needed(first_layer, last_layer, from, to);
    for (size_t i = 0; i < need.size(); ++i) need[i] = std::max<int64_t>(0, need[i] - pools_[i].free());
    return need;
}

void Store::copy_tail(pages::Row& row, pages::Pool& pool, pages::Owner owner) {
    const PageId from = row.page.back(), to = pool.take(owner);
    copy_page(pool, from, to);
    pages::switch_tail(row, to, pool);
}

// Appends tokens from..to of every sequence to one layer. All or nothing.
void Store::append(int layer, TokenTensor k, TokenTensor v, int from, int to) {
    check(open_, "append: no step is open");
    check_layer(layer, "append");
    check(from == done_[layer] && to >= from, "append: tokens ", from, "..", to, " of layer ", layer,
          ", expected to start at ", done_[layer]);
    const int pool_id = layer_pool_[layer];
    pages::Pool& pool = pools_[pool_id];
    const std::vector<int64_t> need = needed(layer, layer + 1, from, to);
    for (int p = 0; p < n_pools(); ++p) {
        if (need[p] <= pools_[p].free()) continue;
        throw std::logic_error(message("append: layer ", layer, " needs ", need[p], " pages of pool ", p, ", ",
                                       pools_[p].free(), " are free; the step did not reserve them"));
    }
    const LayerShape& shape = layers_[layer];
    append_rows_.clear();
    int64_t total = 0;
    for (const StepSequence& s : step_) total += std::max(0, std::min(to, s.count) - std::min(from, s.count));
    pages_.resize(total * shape.kv_heads);
    slots_.resize(total * shape.kv_heads);
    int64_t place = 0;
    for (size_t b = 0; b < step_.size(); ++b) {
        const StepSequence& s = step_[b];
        const int first = std::min(from, s.count), n = std::min(to, s.count) - first;
        if (n <= 0) continue;
        for (int h = 0; h < shape.kv_heads; ++h) {
            pages::Row& row = row_of(*s.sequence, layer, h);
            if (pages::must_copy_tail(row, pool)) copy_tail(row, pool, s.sequence->owner);
            pages::extend(row, n, pool, s.sequence->owner, &pages_[place], &slots_[place]);
            append_rows_.push_back({at(k, options_.dtype, b, h), at(v, options_.dtype, b, h), k.token, v.token,
                                    &tokens_[s.first + first], &pages_[place], &slots_[place], n,
                                    token_pos_[s.first + first], nullptr});
            place += n;
        }
    }
    try {
        fault::hit("append.after_take");
        if (mirror_.on()) lists_of_appends();
        PoolView pool_views[kMaxPools];
        views(pool_views);
        ops::append({append_rows_.data(), static_cast<int32_t>(append_rows_.size()), shape.head_dim, options_.dtype,
                     pool_views, threads_},
                    mirror_.where);
    } catch (...) {
        for (const StepSequence& s : step_) {
            const int n = std::min(to, s.count) - std::min(from, s.count);
            for (int h = 0; n > 0 && h < shape.kv_heads; ++h) pages::withdraw(row_of(*s.sequence, layer, h), n, pools_);
        }
        throw;
    }
    done_[layer] = to;
}

// The rows' lists go to the device, and the books note the positions that its kernel writes there.
void Store::lists_of_appends() {
    for (const ops::AppendRow& row : append_rows_) note_positions(row);
    const std::span<const int32_t> tokens(tokens_);
    const std::span<const PageId> pages(pages_);
    const std::span<const uint8_t> slots(slots_);
    mirror_.begin_lists(Mirror::list_bytes(tokens) + Mirror::list_bytes(pages) + Mirror::list_bytes(slots));
    const auto *at_tokens = mirror_.list(tokens), *at_pages = mirror_.list(pages);
    const auto* at_slots = mirror_.list(slots);
    for (ops::AppendRow& row : append_rows_) {
        row.tokens = at_tokens + (row.tokens - tokens_.data());
        row.slots = at_slots + (row.slots - slots_.data());
        row.pages = at_pages + (row.pages - pages_.data());
    }
}

void Store::note_positions(const ops::AppendRow& row) {
    for (int32_t t = 0; t < row.count; ++t) {
        pages::pool_of(pools_, row.pages[t]).positions(row.pages[t])[row.slots[t]] = row.position + t;
    }
}

// Attends with all of the step's queries over what the layer holds: its own tokens too once they are appended.
void Store::attend(int layer, const AttendCall& call) {
    check(open_, "attend: no step is open");
    check_layer(layer, "attend");
    const LayerShape& shape = layers_[layer];
    const bool windowed = shape.window > 0;
    for (size_t b = 0; !deliveries_.empty() && b < step_.size(); ++b) land(layer, step_[b].id);
    stage_queries(layer, call.q);
    const int32_t *tokens = tokens_.data(), *q_pos = token_pos_.data();
    if (mirror_.on()) {
        const std::span<const int32_t> columns(tokens_), positions(token_pos_);
        mirror_.begin_lists(2 * Mirror::list_bytes(columns));
        tokens = mirror_.list(columns);
        if (windowed) q_pos = mirror_.list(positions);
    }
    attend_rows_.clear();
    for (size_t b = 0; b < step_.size(); ++b) {
        const StepSequence& s = step_[b];
        if (s.count == 0) continue;
        check(done_[layer] == 0 || done_[layer] >= s.count, "attend: layer ", layer,
              " holds a part of the step's tokens");
        for (int h = 0; h < shape.kv_heads; ++h) {
            ops::AttendRow r = attend_row(*s.sequence, layer, h);
            fill_attend_row(r, layer, static_cast<int>(b), h, call);
            r.tokens = tokens + s.first;
            r.q_pos = windowed ? q_pos + s.first : nullptr;
            r.queries = s.count;
            r.own = done_[layer] > 0 ? s.count : 0;
            attend_rows_.push_back(r);
        }
    }
    if (recalls(layer) && longest_ == 1) return attend_selected(layer, call);
    if (any_far(layer)) return attend_streamed(layer, call);
    run_attend(layer, call);
}

// Where the row of sequence b of the step has its queries and results.
void Store::fill_attend_row(ops::AttendRow& r, int layer, int b, int head, const AttendCall& call) const {
    const int64_t first = int64_t{head} * (layers_[layer].q_heads / layers_[layer].kv_heads);
    r.q = at(call.q, options_.dtype, b, first);
    r.q_stride_t = call.q.token;
    r.q_stride_g = call.q.head;
    r.out = const_cast<void*>(at(call.out, call.out_dtype, b, first));
    r.out_stride_t = call.out.token;
    r.out_stride_g = call.out.head;
    r.sinks = call.sinks ? call.sinks + first : nullptr;
    if (!call.lse.data) return;
    r.lse = static_cast<float*>(const_cast<void*>(at(call.lse, DType::f32, b, first)));
    r.lse_stride_t = call.lse.token;
    r.lse_stride_g = call.lse.head;
}

ops::AttendRow Store::attend_row(Sequence& s, int layer, int head) {
    pages::Row& row = row_of(s, layer, head);
    ops::AttendRow r{};
    r.pages = mirror_.pages(row) + row.aside;
    r.visible = mirror_.visible(row) + row.aside;
    r.centre = centre(s, layer, head);
    r.entries = row.entries() - row.aside;
    return r;
}

void Store::run_attend(int layer, const AttendCall& call) {
    const LayerShape& shape = layers_[layer];
    const bool massed = options_.massed && shape.window == 0 && !call.lse.data;
    if (massed) want_mass(layer);
    attend_now(layer, call, call.out_dtype);
    size_t at = 0;
    for (size_t b = 0; massed && b < step_.size(); ++b) {
        for (int h = 0; step_[b].count > 0 && h < shape.kv_heads; ++h, ++at) {
            reduce_mass(attend_rows_[at], shape.q_heads / shape.kv_heads,
                        staged_mass_[b * n_rows_ + first_row_[layer] + h]);
        }
    }
    settle_workspace(longest_);
}

// Attends with the rows as they are filled in.
void Store::attend_now(int layer, const AttendCall& call, DType out_dtype) {
    const LayerShape& shape = layers_[layer];
    PoolView pool_views[kMaxPools];
    views(pool_views);
    ops::AttendParams params{attend_rows_.data(),
                             static_cast<int32_t>(attend_rows_.size()),
                             shape.q_heads / shape.kv_heads,
                             shape.head_dim,
                             options_.dtype,
                             out_dtype,
                             pool_views,
                             call.scale,
                             call.softcap,
                             shape.window,
                             nullptr,
                             call.threads};
    params.workspace = workspace(ops::attend_workspace_bytes(params, mirror_.where));
    ops::attend(params, mirror_.where);
}

// Tokens below this are final: only they may be sealed, planned or dropped.
int64_t Store::base(const Sequence& s, int64_t length) const {
    return recording_ ? std::max(s.confirmed, length - options_.hold) : length;
}

// Seals what has left the tail of a layer and drops what has left its sliding window (the hold stays readable, so that a
// crop within it is exact).
void Store::settle(int layer, Sequence& s, int64_t length) {
    const LayerShape& shape = layers_[layer];
    for (int h = 0; h < shape.kv_heads; ++h) {
        pages::Row& row = row_of(s, layer, h);
        pages::seal(row, base(s, length) - options_.tail, pools_);
        if (recalls(layer)) summarize_sealed(s, layer, h), summarize_groups(s, layer, h);
        if (shape.window == 0) continue;
        const int64_t dropped = pages::drop_before(row, length - shape.window - options_.hold + 1, pools_);
        if (dropped > 0) s.floor = std::max(s.floor, dropped + shape.window - 1);
    }
}

void Store::settle(int layer) {
    check(open_, "settle: no step is open");
    check_layer(layer, "settle");
    for (const StepSequence& s : step_) settle(layer, *s.sequence, seen(layer, *s.sequence));
}

int64_t Store::seen(int layer, const Sequence& s) const {
    if (!open_) return s.length;
    for (const StepSequence& t : step_) {
        if (t.sequence == &s) return s.length + std::min(done_[layer], t.count);
    }
    return s.length;
}

void Store::commit() {
    check(open_, "commit: no step is open");
    for (size_t l = 0; l < layers_.size(); ++l) {
        for (const StepSequence& s : step_) {
            check(done_[l] >= s.count, "commit: layer ", l, " has ", done_[l], " of ", s.count, " tokens");
        }
    }
    for (size_t b = 0; b < step_.size(); ++b) {
        const StepSequence& s = step_[b];
        Sequence& q = *s.sequence;
        q.length += s.count;
        if (!recording_) q.confirmed = q.length;
        for (size_t l = 0; l < q.rings.size(); ++l) {
            QueryRing& own = staged_[b * layers_.size() + l];
            q.rings[l].join(own);
            if (own.capacity() > 1) own = QueryRing();  // decoding keeps its one place
        }
        for (int r = 0; options_.massed && r < n_rows_; ++r) add_mass(q.rows[r], staged_mass_[b * n_rows_ + r]);
        for (size_t l = 0; l < layers_.size(); ++l) settle(static_cast<int>(l), q, q.length);
    }
    open_ = false;
}

void Store::rollback() {
    check(open_, "rollback: no step is open");
    for (const StepSequence& s : step_) s.sequence->floor = std::min(s.sequence->floor, s.sequence->length);
    for (size_t l = 0; l < layers_.size(); ++l) {
        if (done_[l] == 0) continue;
        for (const StepSequence& s : step_) {
            if (s.count == 0) continue;
            for (int h = 0; h < layers_[l].kv_heads; ++h) {
                crop_row(*s.sequence, static_cast<int>(l), h, s.sequence->length);
            }
        }
    }
    open_ = false;
}

}  // namespace kvstrata::store
