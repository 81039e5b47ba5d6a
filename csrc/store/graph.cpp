// Steps that do not change what they launch: all that changes goes up beforehand, to places that stay (layout.h).
#include <algorithm>

#include "common/check.h"
#include "common/fault.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

// Tokens of the open step are appended to the books of all layers, lists go up; attend_laid then writes and reads. Lists have
// room for `entries` at least. All or nothing.
void Store::lay_out(Layout& layout, int entries) {
    check(open_ && !laid_, "lay_out: ", open_ ? "the step is laid out already" : "no step is open");
    if (!mirror_.on()) throw Unsupported("lay_out: the cache is on the CPU, expected a CUDA device");
    for (const StepSequence& s : step_)
        check(s.count == 1, "lay_out: a sequence feeds ", s.count, " tokens, expected 1");
    for (size_t l = 0; l < layers_.size(); ++l) check(done_[l] == 0, "lay_out: layer ", l, " has tokens of the step");
    mirror_.begin_lists(0);
    int extended = 0;
    try {
        extend_rows(extended);
        fault::hit("append.after_take");
        for (size_t l = 0; options_.queries > 0 && l < layers_.size(); ++l) lay_queries(nullptr, static_cast<int>(l));
        Layout::Names names = names_of(entries);
        if (names != layout.names) {
            layout.names.clear();  // should memory be refused
            ++layout.epoch;
            const auto rows = static_cast<int64_t>(pages_.size()), n = static_cast<int64_t>(step_.size());
            const int64_t lists = aligned(rows * 4) + aligned(rows) + 2 * aligned(n * 4);
            const int64_t bytes = lists + laid_workspace();
            if (bytes > layout.bytes) {
                layout.memory = mirror_.shared(bytes);
                layout.bytes = bytes;
            }
            unsigned char* const at = layout.memory.get();
            layout.pages = reinterpret_cast<PageId*>(at);
            layout.slots = at + aligned(rows * 4);
            layout.columns = reinterpret_cast<int32_t*>(layout.slots + aligned(rows));
            layout.positions = reinterpret_cast<int32_t*>(at + lists - aligned(n * 4));
            layout.workspace = at + lists;
            layout.names = std::move(names);
        }
        lay_lists(layout);
    } catch (...) {
        for (int i = extended; i-- > 0;) {
            const int row = i / static_cast<int>(step_.size());
            pages::withdraw(step_[i % step_.size()].sequence->rows[row], 1, pools_);
        }
        throw;
    }
    done_.assign(layers_.size(), 1);
    laid_ = true;
}

// One token more in every row. pages_, slots_ [rows of a sequence, B]; `place` counts the rows that have it.
void Store::extend_rows(int& place) {
    const std::vector<int64_t> need = needed(0, static_cast<int>(layers_.size()), 0, 1);
    for (int p = 0; p < n_pools(); ++p) {
        if (need[p] <= pools_[p].free()) continue;
        throw std::logic_error(message("lay_out: needs ", need[p], " pages of pool ", p, ", ", pools_[p].free(),
                                       " are free; the step did not reserve them"));
    }
    pages_.resize(n_rows_ * step_.size());
    slots_.resize(pages_.size());
    for (size_t l = 0; l < layers_.size(); ++l) {
        pages::Pool& pool = pools_[layer_pool_[l]];
        for (int h = 0; h < layers_[l].kv_heads; ++h) {
            for (size_t b = 0; b < step_.size(); ++b, ++place) {
                Sequence& s = *step_[b].sequence;
                pages::Row& row = row_of(s, static_cast<int>(l), h);
                if (pages::must_copy_tail(row, pool)) copy_tail(row, pool, s.owner);
                pages::extend(row, 1, pool, s.owner, &pages_[place], &slots_[place]);
                pool.positions(pages_[place])[slots_[place]] = token_pos_[step_[b].first];
            }
        }
    }
}

// Places of the step's queries; with q, they go there.
void Store::lay_queries(const TokenTensor* q, int layer) {
    const LayerShape& shape = layers_[layer];
    if (shape.window > 0) return;
    const int64_t width = dtype_bytes(options_.dtype), vector = shape.head_dim * width;
    for (size_t b = 0; b < step_.size(); ++b) {
        QueryRing& ring = staged_[b * layers_.size() + layer];
        if (q) {
            const int64_t element = static_cast<int64_t>(b) * q->batch + tokens_[step_[b].first] * q->token;
            ops::copy({ring.slot(0), vector, static_cast<const unsigned char*>(q->data) + element * width,
                       q->head * width, vector, shape.q_heads},
                      mirror_.where);
            continue;
        }
        if (ring.capacity() != 1) ring = QueryRing(1, shape.q_heads, static_cast<int>(vector), mirror_);
        ring.restart();
        ring.advance();
    }
}

// Also queues the lists of rows.
Layout::Names Store::names_of(int entries) {
    PoolView pool_views[kMaxPools];
    views(pool_views);
    Layout::Names names;
    names.reserve(kMaxPools * 4 + 4 * n_rows_ * step_.size());
    const auto add = [&](const auto* address) { names.push_back(reinterpret_cast<uintptr_t>(address)); };
    for (const PoolView& pool : pool_views) {
        names.push_back(static_cast<uintptr_t>(pool.format) * 2 + (pool.n_slabs > 0));
        add(pool.slabs);
        add(pool.positions);
    }
    for (size_t l = 0; l < layers_.size(); ++l) {
        for (size_t b = 0; b < step_.size(); ++b) {
            if (options_.queries > 0 && layers_[l].window == 0) add(staged_[b * layers_.size() + l].slot(0));
            for (int h = 0; h < layers_[l].kv_heads; ++h) {
                pages::Row& row = row_of(*step_[b].sequence, static_cast<int>(l), h);
                add(mirror_.pages(row, entries));
                mirror_.pad(row);
                names.push_back(static_cast<uintptr_t>(row.list.capacity));
                names.push_back(static_cast<uintptr_t>(row.aside));
                add(centre(*step_[b].sequence, static_cast<int>(l), h));
            }
        }
    }
    return names;
}

void Store::lay_lists(Layout& layout) {
    mirror_.put(layout.pages, pages_.data(), static_cast<int64_t>(pages_.size()) * int64_t{sizeof(PageId)});
    mirror_.put(layout.slots, slots_.data(), static_cast<int64_t>(slots_.size()));
    mirror_.put(layout.columns, tokens_.data(), static_cast<int64_t>(tokens_.size()) * int64_t{sizeof(int32_t)});
    mirror_.put(layout.positions, token_pos_.data(),
                static_cast<int64_t>(token_pos_.size()) * int64_t{sizeof(int32_t)});
    mirror_.flush();
}

// attend_rows_: rows of a layer, without the tensors of a call.
void Store::laid_rows(int layer) {
    attend_rows_.clear();
    for (const StepSequence& s : step_) {
        for (int h = 0; h < layers_[layer].kv_heads; ++h) {
            const pages::Row& row = row_of(*s.sequence, layer, h);
            ops::AttendRow r{};
            r.pages = reinterpret_cast<const PageId*>(row.list.memory) + row.aside;
            r.visible = mirror_.visible(row) + row.aside;
            r.centre = centre(*s.sequence, layer, h);
            r.entries = row.list.capacity - row.aside;
            r.queries = r.own = 1;
            attend_rows_.push_back(r);
        }
    }
}

int64_t Store::laid_workspace() {
    int64_t most = 0;
    for (size_t l = 0; l < layers_.size(); ++l) {
        const LayerShape& shape = layers_[l];
        laid_rows(static_cast<int>(l));
        ops::AttendParams params{};
        params.rows = attend_rows_.data();
        params.n_rows = static_cast<int32_t>(attend_rows_.size());
        params.group = shape.q_heads / shape.kv_heads;
        params.head_dim = shape.head_dim;
        most = std::max(most, ops::attend_workspace_bytes(params, mirror_.where));
    }
    return most;
}

// Writes the layer's tokens, and attends with all of the step's queries over what the layer holds. Launches alone: nothing goes
// up, no memory is asked for, nobody waits.
void Store::attend_laid(const Layout& layout, int layer, TokenTensor k, TokenTensor v, const AttendCall& call) {
    check(open_ && laid_, "attend_laid: the step is not laid out");
    check_layer(layer, "attend_laid");
    const LayerShape& shape = layers_[layer];
    const int64_t width = dtype_bytes(options_.dtype);
    PoolView pool_views[kMaxPools];
    views(pool_views);
    if (options_.queries > 0) lay_queries(&call.q, layer);
    append_rows_.clear();
    laid_rows(layer);
    for (int h = 0; h < shape.kv_heads; ++h) {
        for (size_t b = 0; b < step_.size(); ++b) {
            const size_t place = (first_row_[layer] + h) * step_.size() + b;
            const auto from = [&](const TokenTensor& t) {
                return static_cast<const unsigned char*>(t.data) +
                       (static_cast<int64_t>(b) * t.batch + h * t.head) * width;
            };
            append_rows_.push_back({from(k), from(v), k.token, v.token, layout.columns + step_[b].first,
                                    layout.pages + place, layout.slots + place, 1, 0,
                                    layout.positions + step_[b].first});
            ops::AttendRow& r = attend_rows_[b * shape.kv_heads + h];
            fill_attend_row(r, layer, static_cast<int>(b), h, call);
            r.tokens = layout.columns + step_[b].first;
            r.q_pos = shape.window > 0 ? layout.positions + step_[b].first : nullptr;
        }
    }
    ops::append({append_rows_.data(), static_cast<int32_t>(append_rows_.size()), shape.head_dim, options_.dtype,
                 pool_views, call.threads},
                mirror_.where);
    ops::attend({attend_rows_.data(), static_cast<int32_t>(attend_rows_.size()), shape.q_heads / shape.kv_heads,
                 shape.head_dim, options_.dtype, call.out_dtype, pool_views, call.scale, call.softcap, shape.window,
                 layout.workspace, call.threads},
                mirror_.where);
}

}  // namespace kvstrata::store
