// Memory of a store: slabs come in, empty ones go out, pages move between slabs so that slabs run empty.
#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "common/huge_pages.h"
#include "common/layout.h"
#include "store/store.h"

namespace kvstrata::store {
namespace {

Format full_format(DType dtype) {
    switch (dtype) {
        case DType::f32: return Format::f32;
        case DType::bf16: return Format::bf16;
        case DType::f16: return Format::f16;
        default: throw Unsupported("Store: dtype is not float32, bfloat16 or float16");
    }
}

State state_of(Format quantized) {
    return static_cast<State>(static_cast<int>(State::int8) + static_cast<int>(quantized) -
                              static_cast<int>(Format::int8));
}

}  // namespace

Store::Store(std::vector<LayerShape> layers, Options options) : layers_(std::move(layers)), options_(options) {
    check(!layers_.empty(), "Store: layers is empty, expected at least one");
    const Format format = full_format(options_.dtype);
    const auto pool_for = [this](Format f, int head_dim, Tier tier) {
        const auto same = std::find_if(info_.begin(), info_.end(), [&](const PoolInfo& i) {
            return i.format == f && i.head_dim == head_dim && i.tier == tier;
        });
        const int pool = static_cast<int>(same - info_.begin());
        if (same == info_.end()) {
            if (pool == kMaxPools) throw Unsupported("Store: more than 8 different formats, head dimensions and tiers");
            info_.push_back({f, head_dim, page_bytes(f, head_dim), tier});
            kinds_.push_back({is_full(f) ? State::full : kvstrata::store::state_of(f), tier});
            pools_.emplace_back(pool, info_.back().page_bytes, options_.charged);
            far_.emplace_back(info_.back().page_bytes);
            rings_.emplace_back();
        }
        return pool;
    };
    for (size_t l = 0; l < layers_.size(); ++l) {
        const LayerShape& s = layers_[l];
        check(s.kv_heads >= 1 && s.q_heads >= 1 && s.q_heads % s.kv_heads == 0, "Store: layer ", l, " has q_heads ",
              s.q_heads, ", expected a multiple of kv_heads ", s.kv_heads);
        check(s.head_dim >= 1 && s.head_dim <= kMaxHeadDim, "Store: layer ", l, " has head_dim ", s.head_dim,
              ", expected 1..", kMaxHeadDim);
        check(s.window >= 0, "Store: layer ", l, " has window ", s.window, ", expected >= 0");
        layer_pool_.push_back(pool_for(format, s.head_dim, Tier::near));
        first_row_.push_back(n_rows_);
        n_rows_ += s.kv_heads;
    }
    pool_of_.assign(layers_.size() * kTiers * kStates, -1);
    const auto place = [this](size_t layer, State state, Tier tier) -> int& {
        return pool_of_[(layer * kTiers + static_cast<int>(tier)) * kStates + static_cast<int>(state)];
    };
    const auto need_quantizable = [this](size_t l, const char* what) {
        if (quantizable(layers_[l].head_dim)) return;
        throw Unsupported(message("Store: layer ", l, " has head_dim ", layers_[l].head_dim, ", ", what,
                                  " need a multiple of 16 in 32..512"));
    };
    dense_.assign(layers_.size(), 0);
    for (int l : options_.dense) {
        check(l >= 0 && l < static_cast<int>(layers_.size()), "Store: dense has layer ", l, ", expected 0..",
              layers_.size() - 1);
        dense_[l] = 1;
    }
    for (int l = 0; l < static_cast<int>(layers_.size()); ++l) n_indexed_ += indexed(l);
    find_anchors(options_.recall.reuse);
    check(options_.far.size() <= 1, "Store: far has ", options_.far.size(), " states, expected at most 1");
    for (size_t l = 0; l < layers_.size(); ++l) {
        place(l, State::full, Tier::near) = layer_pool_[l];
        if (layers_[l].window > 0) continue;
        for (Format f : options_.formats) {
            check(!is_full(f), "Store: formats has a full format, expected int8, int4 or int2");
            need_quantizable(l, "quantized formats");
            place(l, kvstrata::store::state_of(f), Tier::near) = pool_for(f, layers_[l].head_dim, Tier::near);
        }
        if (!indexed(static_cast<int>(l)) || (options_.far.empty() && options_.recall.pages == 0)) continue;
        if (!options_.sets) need_quantizable(l, "summaries of pages");
        for (State state : options_.far) {
            const int near = place(l, state, Tier::near);
            check(near >= 0, "Store: far has state ", static_cast<int>(state), ", expected 1 or one of the formats");
            place(l, state, Tier::far) = pool_for(info_[near].format, layers_[l].head_dim, Tier::far);
        }
    }
    refit(options_.tail, options_.queries);
    check(options_.hold >= 0, "Store: hold is ", options_.hold, ", expected >= 0");
    check(options_.sinks >= 0, "Store: sinks is ", options_.sinks, ", expected >= 0");
    check(options_.recall.pages == 0 || options_.sinks % kSlots == 0, "Store: sinks is ", options_.sinks,
          ", expected a multiple of ", kSlots, " where pages are selected");
    check(options_.far.empty() || options_.ring >= 2, "Store: ring is ", options_.ring, ", expected at least 2 pages");
    check(!options_.sets || (options_.recall.pages == 0 && !options_.massed),
          "Store: sets with recall or mass, expected one or the other");
    mirror_.where = options_.where;
    if (mirror_.on()) refuse_on_device();
    set_recall(options_.recall);
}

int Store::pool_of(int layer, State state, Tier tier) const {
    if (state > State::int2 || state == State::evicted || tier > Tier::far) return -1;
    return pool_of_[(layer * kTiers + static_cast<int>(tier)) * kStates + static_cast<int>(state)];
}

// Another tail and another number of queries, both as in Options: what a policy asks for that was made to fit a limit.
void Store::refit(int tail, int queries) {
    check(tail >= kSlots && tail % kSlots == 0, "Store: tail is ", tail, ", expected a positive multiple of ", kSlots);
    check(queries >= 0, "Store: queries is ", queries, ", expected >= 0");
    for (const auto& [id, s] : sequences_) check(s->length == 0, "refit: sequence ", id, " has tokens, expected none");
    options_.tail = tail;
    options_.queries = queries;
    staged_.assign(open_ && queries > 0 ? step_.size() * layers_.size() : 0,
                   {});  // a step may be open, without a token yet
    for (auto& [id, s] : sequences_) s->rings = rings();
}

int Store::lend(int pool, unsigned char* payload, int32_t* positions, int n_pages, int32_t* on_device) {
    check(pool >= 0 && pool < n_pools(), "lend: pool is ", pool, ", expected 0..", n_pools() - 1);
    check(info_[pool].tier == Tier::near, "lend: pool ", pool, " is of the Far tier, expected lend_far");
    check(mirror_.on() == (on_device != nullptr), "lend: the device's positions are ", on_device ? "" : "not ",
          "given, expected them where payload is not the CPU's");
    const int slab = pools_[pool].lend(payload, positions, n_pages, on_device);
    if (!mirror_.on()) hint_huge_pages(payload, n_pages * info_[pool].page_bytes);
    ++lent_;
    return slab;
}

// A slab of the Far tier: n_pages pages of the file from `offset` on, whose space is there already.
int Store::lend_far(int pool, int file, int64_t offset, int32_t* positions, int n_pages) {
    check(pool >= 0 && pool < n_pools() && info_[pool].tier == Tier::far, "lend_far: pool is ", pool,
          ", expected one of the Far tier");
    const int slab = pools_[pool].lend(nullptr, positions, n_pages);
    far_[pool].lend(slab, file, offset, n_pages);
    return slab;
}

// Pages that a file of others holds, which rows take one by one as they are restored: nothing else is ever put there.
int Store::lend_named(int pool, int file, int64_t offset, int32_t* positions, std::vector<int32_t> places,
                      std::vector<uint64_t> sums, std::string name) {
    check(pool >= 0 && pool < n_pools() && info_[pool].tier == Tier::far, "lend_named: pool is ", pool,
          ", expected one of the Far tier");
    check(places.size() == sums.size(), "lend_named: ", places.size(), " places, ", sums.size(),
          " sums, expected as many");
    const int slab = pools_[pool].lend(nullptr, positions, static_cast<int>(places.size()));
    pools_[pool].set_closed(slab, true);
    far_[pool].lend_named(slab, file, offset, std::move(places), std::move(sums), std::move(name));
    return slab;
}

void Store::give_back(int pool, int slab) {
    check(pool >= 0 && pool < n_pools(), "give_back: pool is ", pool, ", expected 0..", n_pools() - 1);
    pools_[pool].give_back(slab);
    ++lent_;
    if (info_[pool].tier == Tier::far) far_[pool].give_back(slab);
}

// The Near pool of the same pages as a Far one.
int Store::near_of(int far_pool) const {
    const PoolInfo& far = info_[far_pool];
    const auto near = std::find_if(info_.begin(), info_.end(), [&](const PoolInfo& i) {
        return i.tier == Tier::near && i.format == far.format && i.head_dim == far.head_dim;
    });
    return static_cast<int>(near - info_.begin());  // a Far pool is made beside it
}

std::vector<int64_t> Store::ring_pages() const {
    std::vector<int64_t> pages(pools_.size(), 0);
    for (int p = 0; p < n_pools(); ++p) {
        if (info_[p].tier == Tier::far) pages[near_of(p)] += options_.ring;
    }
    return pages;
}

// Takes the Near pages in which Far pages are put together and read through; they must be free.
void Store::hold_ring() {
    for (int p = 0; p < n_pools(); ++p) {
        if (info_[p].tier == Tier::near || !rings_[p].empty()) continue;
        for (int i = 0; i < options_.ring; ++i) rings_[p].push_back(pools_[near_of(p)].take(pages::kCache));
    }
}

void Store::shrink_ring(int pages) {
    check(pages >= 2 && pages <= options_.ring, "shrink_ring: pages is ", pages, ", expected 2..", options_.ring);
    check(options_.recall.near_pages > 0 || pages >= options_.recall.widest(), "shrink_ring: pages is ", pages,
          ", expected the ", options_.recall.widest(), " that a step reads, as rows keep no copies");
    for (const auto& [id, s] : sequences_) {
        check(s->length == 0, "shrink_ring: sequence ", id, " has tokens, expected none");
    }
    options_.ring = pages;
    for (int p = 0; p < n_pools(); ++p) {
        for (; static_cast<int>(rings_[p].size()) > pages; rings_[p].pop_back()) {
            pools_[near_of(p)].release(rings_[p].back());
        }
    }
}

bool Store::empty_out(int pool, int slab) {
    check(pool >= 0 && pool < n_pools(), "empty_out: pool is ", pool, ", expected 0..", n_pools() - 1);
    check(info_[pool].tier == Tier::near, "empty_out: pool ", pool,
          " is of the Far tier, expected one of the Near tier");
    pages::Pool& p = pools_[pool];
    check(slab >= 0 && slab < static_cast<int>(p.slabs().size()), "empty_out: slab ", slab, " is not lent");
    const pages::Slab& s = p.slabs()[slab];
    check(s.n_pages > 0, "empty_out: slab ", slab, " is not lent");
    const int64_t live = s.n_pages - s.n_free;
    if (p.free() - s.n_free < live) return false;
    p.set_closed(slab, true);
    std::unordered_map<PageId, PageId> moved;
    const auto move = [&](PageId& page) {
        if (page_pool(page) != pool || page_slab(page) != slab) return;
        auto [at, first] = moved.try_emplace(page, kNoPage);
        if (first) {
            at->second = p.take(p.owner(page));
            copy_page(p, page, at->second);
        } else {
            p.share(at->second);
        }
        p.release(page);
        page = at->second;
    };
    for (auto& [id, sequence] : sequences_) {
        for (pages::Row& row : sequence->rows) {
            for (int e = 0; e < row.entries(); ++e) {
                const PageId before = row.page[e];
                move(row.page[e]);
                if (row.page[e] != before) row.changed(e);
            }
            for (pages::NearSlot& copy : row.near.slots) move(copy.page);
        }
    }
    for (auto& ring : rings_) {
        for (PageId& page : ring) move(page);
    }
    for (Delivery& delivery : deliveries_) {
        for (Fetch& f : delivery.fetches) {
            if (page_pool(f.near) != pool || page_slab(f.near) != slab) continue;
            const PageId to = p.take(p.owner(f.near));
            copier().move(f.ticket, p.payload(to));
            p.release(f.near);
            f.near = to;
        }
    }
    return true;
}

// Bytes and positions, of payload and of the books.
void Store::copy_page(pages::Pool& pool, PageId from, PageId to) {
    const int64_t bytes = pool.page_bytes();
    ops::copy({pool.payload(to), bytes, pool.payload(from), bytes, bytes, 1}, mirror_.where);
    std::memcpy(pool.positions(to), pool.positions(from), kPositionBytes);
    if (!mirror_.on()) return;
    ops::copy(
        {pool.device_positions(to), kPositionBytes, pool.device_positions(from), kPositionBytes, kPositionBytes, 1},
        mirror_.where);
}

// What a store on a device does not do.
void Store::refuse_on_device() const {
    const auto refuse = [](bool asked, const char* what) {
        if (asked) throw Unsupported(message("Store: ", what, " on a CUDA device, expected none"));
    };
    refuse(options_.recall.pages > 0, "selection of pages");
    refuse(!options_.far.empty(), "a Far tier");
    refuse(options_.massed, "attention mass");
    refuse(options_.sets, "sets of pages");
}

int64_t Store::metadata_bytes() const {
    int64_t bytes = 0;
    for (const pages::Pool& p : pools_) bytes += p.metadata_bytes();
    for (const auto& [id, sequence] : sequences_) {
        bytes += sizeof(Sequence);
        for (const pages::Row& row : sequence->rows) bytes += row.metadata_bytes();
        bytes += static_cast<int64_t>(sequence->centres.capacity() * sizeof(Centre) +
                                      sequence->rings.capacity() * sizeof(QueryRing));
        for (const Centre& c : sequence->centres) bytes += c.mean ? c.mean->size() * sizeof(float) : 0;
        for (const QueryRing& ring : sequence->rings) bytes += ring.bytes();
        bytes += static_cast<int64_t>(sequence->indices.capacity() * sizeof(Index) +
                                      sequence->routed.capacity() * sizeof(uint32_t));
        for (const Index& index : sequence->indices) bytes += index.bytes();
    }
    for (const FarSlabs& far : far_) bytes += far.metadata_bytes();
    for (const Delivery& delivery : deliveries_)
        bytes += static_cast<int64_t>(delivery.fetches.capacity() * sizeof(Fetch));
    for (const QueryRing& ring : staged_) bytes += ring.bytes();
    for (const auto& mass : staged_mass_) bytes += static_cast<int64_t>(mass.capacity() * sizeof(float));
    return bytes;
}

void Store::views(PoolView* out) {
    std::fill_n(out, kMaxPools, PoolView{});  // ops look for the formats that there are
    for (size_t i = 0; i < pools_.size(); ++i) {
        const pages::Pool& p = pools_[i];
        out[i] = {info_[i].format, static_cast<int32_t>(p.slabs().size()), p.page_bytes(), p.payload_table(),
                  p.position_table()};
    }
    if (!mirror_.on()) return;
    mirror_.pools(out, pools_.size(), lent_);
    mirror_.flush();
}

int64_t Store::workspace_bytes() const {
    return static_cast<int64_t>(workspace_.size() + (logits_.capacity() + lse_.capacity()) * sizeof(float)) +
           parts_.bytes() + chosen_.bytes();
}

void* Store::workspace(int64_t bytes) {
    if (bytes == 0) return nullptr;
    if (mirror_.on()) return mirror_.workspace(bytes);
    if (static_cast<int64_t>(workspace_.size()) < bytes + 64) workspace_.resize(bytes + 64);
    const auto address = reinterpret_cast<uintptr_t>(workspace_.data());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

// Decoding keeps its workspace. What several queries need is large: it goes with their activations, and must not count
// against what the cache holds afterwards.
void Store::settle_workspace(int queries) {
    if (mirror_.on()) return mirror_.settle_workspace(queries > 1);
    if (queries > 1) std::vector<float>().swap(logits_);
    if (queries <= 1) {
        kept_workspace_ = workspace_.size();
    } else if (workspace_.size() > kept_workspace_) {
        std::vector<unsigned char>(kept_workspace_).swap(workspace_);
    }
}

}  // namespace kvstrata::store
