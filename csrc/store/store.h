// Store: the data paths of one cache over pages and ops. One owner of pools, page tables and the open step.
//
// A step: begin -> per layer append and attend -> commit, or rollback at any point. Between begin and commit nothing but
// the step's own tokens changes, except in a layer that was settled inside the step (a prompt cut layer by layer), whose
// older tokens stay as cut. Memory is lent before it is needed: no call here allocates payload, and one that finds too
// few free pages changes nothing.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "common/types.h"
#include "ops/append.h"
#include "ops/attend.h"
#include "ops/estimate.h"
#include "ops/measure.h"
#include "ops/pool.h"
#include "ops/pool_view.h"
#include "ops/score_keys.h"
#include "ops/score_max.h"
#include "ops/score_pages.h"
#include "ops/score_window.h"
#include "pages/pool.h"
#include "pages/row.h"
#include "store/call.h"
#include "store/charges.h"
#include "store/delivery.h"
#include "store/far.h"
#include "store/index.h"
#include "store/layout.h"
#include "store/look.h"
#include "store/mirror.h"
#include "store/queries.h"
#include "store/reading.h"
#include "store/repack.h"
#include "store/saved.h"
#include "store/sequence.h"

namespace kvstrata::store {

struct LayerShape {
    int32_t kv_heads;
    int32_t q_heads;
    int32_t head_dim;
    int32_t window;  // sliding window in tokens; 0: full attention
};

struct Options {
    DType dtype;                       // of q, k, v and of Full pages
    int32_t tail;                      // w: a page seals once w newer tokens exist
    int32_t hold;                      // unconfirmed tokens while recording; also kept beyond a sliding window
    int32_t sinks;                     // tokens 0..sinks-1 may not change state
    std::vector<Format> formats = {};  // quantized formats that plans may name, on layers without a sliding window
    int32_t queries = 0;               // W: last queries of each row that are remembered for scoring
    bool scored = false;               // each stored token has a score, f32, which moves with it
    bool massed = false;               // scores are the attention mass that each token has received; needs `scored`
    Recall recall = {};
    std::vector<int> dense = {};  // layers without selection and Far tier, though their attention is full
    std::vector<State> far = {};  // states in which tokens may go to the Far tier
    int ring = 0;                 // Near pages of each Far pool in which pages are put together and read through
    bool sets = false;            // pages belong to sets; without recall and mass
    bool charged = false;         // pages know who took them
    bool centred = true;          // a row's quantized keys are relative to the mean of its first ones
    Where where = {};             // where payload lies and ops run; books are the CPU's
};

struct PoolInfo {
    Format format;
    int32_t head_dim;
    int64_t page_bytes;
    Tier tier;
};

class Store {
  public:
    Store(std::vector<LayerShape> layers, Options options);

    // Memory (memory.cpp)
    int n_pools() const { return static_cast<int>(pools_.size()); }
    PoolInfo pool_info(int pool) const { return info_[pool]; }
    const pages::Pool& pool(int pool) const { return pools_[pool]; }
    int pool_of(int layer) const { return layer_pool_[layer]; }         // of its full pages
    int pool_of(int layer, State state, Tier tier = Tier::near) const;  // -1: no such pages
    // positions: the CPU's; on_device: those beside the payload, where that is elsewhere, else null.
    int lend(int pool, unsigned char* payload, int32_t* positions, int n_pages, int32_t* on_device);
    void set_lend(Mirror::Lend lend) { mirror_.set_lend(std::move(lend)); }
    void set_stream(void* stream) { mirror_.where.stream = stream; }
    int lend_far(int pool, int file, int64_t offset, int32_t* positions, int n_pages);
    int lend_named(int pool, int file, int64_t offset, int32_t* positions, std::vector<int32_t> places,
                   std::vector<uint64_t> sums, std::string name);
    void give_back(int pool, int slab);
    std::vector<int64_t> ring_pages() const;  // by pool, that hold_ring takes
    void hold_ring();
    void shrink_ring(int pages);         // before the first token
    bool empty_out(int pool, int slab);  // moves its live pages elsewhere; false if there is no room for them
    int64_t metadata_bytes() const;
    int64_t workspace_bytes() const;

    // Sequences (sequences.cpp)
    std::vector<SeqId> create(int n);
    void free(std::span<const SeqId> seqs);
    std::vector<SeqId> fork(SeqId parent, int n);
    std::vector<SeqId> select(std::span<const SeqId> seqs, std::span<const int64_t> index);
    void crop(SeqId seq, int64_t length);
    void confirm(SeqId seq);
    void clear(SeqId seq);  // empty again, all pages released
    void set_recording(bool on) { recording_ = on; }
    void set_threads(int n) { threads_ = n; }
    void refit(int tail, int queries);  // before the first token
    const Sequence& sequence(SeqId seq) const;
    const pages::Row& row(SeqId seq, int layer, int head) const;
    void positions(SeqId seq, int layer, int head, int32_t* out);
    void read(SeqId seq, int layer, int head, float* k, float* v);  // stored slots in table order, decoded: f32 [n, D]

    // Who holds what (charges.cpp)
    std::vector<Charge> charges() const;       // of a store that is charged
    std::vector<Holding> holdings(SeqId seq);  // of the pages that it holds

    // Step (step.cpp)
    void begin(std::span<const SeqId> seqs, std::span<const int32_t> starts, std::span<const int32_t> tokens);
    std::vector<int64_t> needed(int first_layer, int last_layer, int from, int to);   // pages per pool
    std::vector<int64_t> missing(int first_layer, int last_layer, int from, int to);  // of those, more than are free
    // Of those, by place in the step [B, pools]; Near copies of Far pages are the cache's.
    std::vector<int64_t> needed_each(int first_layer, int last_layer, int from, int to);
    void append(int layer, TokenTensor k, TokenTensor v, int from, int to);
    void attend(int layer, const AttendCall& call);
    void stage_queries(int layer, const TokenTensor& q);  // attend does it too; for layers attended elsewhere
    // Adds the mass of tokens from..to's queries, the last that were appended: for layers attended elsewhere. Stands even
    // if the step fails, as a cut does.
    void add_mass(int layer, const TokenTensor& q, int from, int to, float scale, float softcap);
    void settle(int layer);
    void commit();
    void rollback();
    bool in_step() const { return open_; }

    // Steps that do not change what they launch (graph.cpp)
    void lay_out(Layout& layout, int entries);  // appends one token of each sequence to all layers, but for its bytes
    void attend_laid(const Layout& layout, int layer, TokenTensor k, TokenTensor v, const AttendCall& call);

    int64_t seen(int layer, const Sequence& s) const;  // tokens, those of an open step that a layer has appended too
    int longest() const { return longest_; }           // most tokens that one sequence feeds in the open step

    // Recall (recall.cpp)
    void set_recall(const Recall& recall);  // of another kind of summaries: every sealed page is summarized anew
    bool shrink_near();                     // Near copies to what a step reads, then to none; whether there were more
    void set_choose(Choose choose) { choose_ = std::move(choose); }  // instead of votes by summaries; or none
    void set_mass_floor(float floor) { mass_floor_ = floor; }
    const Captured& captured() const { return captured_; }
    const Audited& audited() const { return audited_; }
    std::pair<int64_t, int64_t> fetched() const { return {hits_, misses_count_}; }  // pages: found Near, read from Far
    // Whether steps go on while a disk brings their pages, and how long one of these may take (fetch.cpp).
    void set_ahead(bool on, std::chrono::milliseconds limit);
    const Late& late() const { return ahead_.late; }
    Waiting waiting(int layer, std::span<const SeqId> seqs);
    void cluster(int layer, std::span<const SeqId> seqs, const int32_t* segment, int32_t* group, int64_t columns,
                 int iters);  // tokens of one segment of a row into groups of one number each; iters < 0: greedily

    // What a policy sees (look.cpp). R = seqs x heads, in that order; N = columns
    int64_t columns(int layer, std::span<const SeqId> seqs);  // most stored tokens of any of their rows
    void look(int layer, std::span<const SeqId> seqs, const Look& out, int64_t columns);
    Tally tally(int layer, std::span<const SeqId> seqs);
    void set_scores(int layer, std::span<const SeqId> seqs, const float* scores, int64_t columns);  // f32 [R, N]
    int queries(int layer, SeqId seq, void* out);  // the last queries, oldest first, [Hq, count, D] -> count

    // What scorers read (scores.cpp): f32 [R, N] in table order, zeros beyond a row's last token; G query heads apart in
    // score_window [R, G, N] and measure [R, G, 3]. The last `queries` queries of each row take part.
    void score_window(int layer, std::span<const SeqId> seqs, int queries, ops::Spread spread, float weight,
                      const Arithmetic& arithmetic, float* out, int64_t columns);
    // Of each span [E, R, N]: the most that its queries saw of each token.
    void score_max(int layer, std::span<const SeqId> seqs, const SpanQueries& queries, const Arithmetic& arithmetic,
                   float* out, int64_t columns);
    void measure(int layer, std::span<const SeqId> seqs, int queries, ops::Stats which, const Arithmetic& arithmetic,
                 float* out);
    void score_keys(int layer, std::span<const SeqId> seqs, ops::KeyScore kind, float* out, int64_t columns);
    // By summaries alone, Far pages too: each token's part of the share of attention that its page is estimated to receive,
    // the mean over queries and query heads; of sealed tokens that are neither sinks nor in the tail.
    void score_pages(int layer, std::span<const SeqId> seqs, int queries, const Arithmetic& arithmetic, float* out,
                     int64_t columns);
    void pool_scores(int layer, std::span<const SeqId> seqs, const float* score, int group, int64_t columns, int kernel,
                     ops::PoolKind kind, ops::PoolDivide divide, float* out);  // score [R, group, N] -> [R, N]

    // Sets (sets.cpp)
    void set_view(SeqId seq, pages::View view);  // what its steps read; pages that are Far then have to be brought
    void show(int layer, SeqId seq, bool all);   // a layer by itself: all sets, or those of the view
    std::vector<int64_t> moving(int layer, SeqId seq);  // pages of each pool that bring and put_aside take
    void bring(int layer, SeqId seq);                   // Far pages that the layer shows come Near
    void put_aside(int layer, SeqId seq, bool stay);    // others get a Far page, and go there or stay
    bool give_way();                                    // of one layer of a set they leave; whether any did
    // Fetched beside other work (ahead.cpp): tables say Far until it has landed, which attending to the layer waits for.
    void bring_ahead(int layer, SeqId seq);  // as bring
    void land(int layer, SeqId seq);         // MachineError where it did not come; the pages stay Far
    void end_ahead(SeqId seq);               // of all layers; what did not come stays Far, without an error
    bool ahead(SeqId seq) const;             // whether any is on its way
    void stop_reading();                     // of all sequences; nothing is waited for
    int64_t moved_bytes() const { return moved_bytes_; }  // by these, so far
    void look_sets(int layer, std::span<const SeqId> seqs, pages::SetTag* out,
                   int64_t columns);  // [R, N]; 0 beyond a row
    // Queries at `positions` [n] that are no tokens of the sequence, over all that a layer's view holds; in a step its tokens
    // that are appended count. call: q and out [n, Hq, D], lse.
    void attend_beside(int layer, SeqId seq, std::span<const int32_t> positions, const AttendCall& call);

    // What rows hold, to be kept elsewhere and put back (saved.cpp)
    void copy_out(SeqId seq, int layer, int head, std::span<const int32_t> entries, unsigned char* payload,
                  int32_t* positions);
    Centre centre_of(SeqId seq, int layer, int head) const;
    void restore_row(SeqId seq, int layer, int head, const SavedRow& saved);  // scores, if kept, are 0
    void restore_length(SeqId seq, int64_t length, int64_t floor);            // after all its rows

    // Plan (plan.cpp)
    void check_plan(int layer, std::span<const SeqId> seqs, const PlanColumns& plan, bool protect);
    PlanPiece plan_piece(int layer, SeqId seq, int head, const RowPlan& plan, std::span<const int64_t> cost,
                         int64_t spare, int64_t room);
    bool apply_plan(int layer, SeqId seq, int head, const RowPlan& plan, uint8_t* state, pages::SetTag* set, int most);

  private:
    struct StepSequence {
        SeqId id;
        Sequence* sequence;
        int32_t first, count;  // its tokens: tokens_[first .. first + count)
    };

    struct Scored;
    struct Writing;
    struct Underway;
    Scored scored(int layer, std::span<const SeqId> seqs, int queries, const char* verb, bool reads = true);
    void add_votes(int layer, std::span<const SeqId> seqs, const Scored& s, int t, const Arithmetic& arithmetic,
                   float* mass);
    void fill(ops::WindowParams& p, const Scored& s, int layer, const Arithmetic& a, const PoolView* pools) const;
    Sequence& find(SeqId seq, const char* verb);
    void check_sequences(std::span<const SeqId> seqs, const char* verb);  // all exist, none twice
    void check_layer(int layer, const char* verb) const;
    pages::Row& row_of(Sequence& s, int layer, int head) { return s.rows[first_row_[layer] + head]; }
    ops::AttendRow attend_row(Sequence& s, int layer, int head);
    void fill_attend_row(ops::AttendRow& r, int layer, int b, int head, const AttendCall& call) const;
    void extend_rows(int& place);
    void lay_lists(Layout& layout);
    void lay_queries(const TokenTensor* q, int layer);
    Layout::Names names_of(int entries);
    int64_t laid_workspace();
    void laid_rows(int layer);
    void note_positions(const ops::AppendRow& row);
    void lists_of_appends();
    void copy_page(pages::Pool& pool, PageId from, PageId to);
    void decode(std::span<const PageId> pages, const float* mean, int dim, float* k, float* v);
    void refuse_on_device() const;
    void run_attend(int layer, const AttendCall& call);
    void want_mass(int layer);
    void add_mass(pages::Row& row, const std::vector<float>& mass);
    void reduce_mass(const ops::AttendRow& row, int group, std::vector<float>& out);
    Sequence blank();  // without a token
    std::vector<QueryRing> rings();
    QueryRing last_queries(int layer, SeqId seq) const;
    Sequence clone(const Sequence& s);
    void check_saved(int layer, const SavedRow& saved) const;
    void check_row_plan(int layer, const pages::Row& row, int64_t line, const PlanColumns& plan, bool protect);
    void check_set(const pages::Row& row, int entry, int64_t line, int i, pages::SetTag to) const;
    bool recalls(int layer) const { return options_.recall.pages > 0 && indexed(layer); }
    bool indexed(int layer) const;  // its rows may be selected from, and go Far
    int first_indexed(const pages::Row& row) const;
    bool far(PageId page) const { return kinds_[page_pool(page)].tier == Tier::far; }
    const std::vector<PageId>& ring_of(int far_pool) const { return rings_[far_pool]; }
    int near_of(int far_pool) const;
    int far_of(int layer, PageId page) const;
    bool goes_far(const pages::Row& row, int entry) const;
    void turn(pages::Row& row, const pages::View& view);
    void take_in(Delivery& delivery), let_go(Delivery& delivery), give_up(SeqId seq);
    Copier& copier();
    void write_far(PageId page, PageId from);
    void read_far(PageId page, PageId to);
    void summarize(Sequence& s, int layer, int head, std::span<const pages::Fresh> pages, const std::vector<PageId>* at,
                   Index& out);
    void summarize_anew(SummaryKind kind);
    void shrink_copies(int most);
    Index summarized(Sequence& s, int layer, int head);
    void summarize_sealed(Sequence& s, int layer, int head);
    void summarize_groups(Sequence& s, int layer, int head);
    bool in_groups(const pages::Row& row) const;
    void join_index(Sequence& s, int layer, int head, const Repack& r, const Index& fresh);
    bool any_far(int layer) const;
    void attend_selected(int layer, const AttendCall& call);
    void attend_streamed(int layer, const AttendCall& call);
    void call_in(PageId page, PageId to, int32_t r, int32_t entry);
    void take_due(size_t n);
    void fetch(int32_t r, std::span<const int32_t> entries);
    void attend_fetched(int layer, const AttendCall& call);
    void attend_listed(int layer, const AttendCall& call, int first, int end);
    void hint_entries(const pages::Row& row, std::span<const int32_t> entries, size_t n);
    void note_sought(int layer);
    void hint_next(int layer);
    void begin_parts(int layer);
    ops::AttendRow part_row(int r, int group, int dim, int part, size_t first, size_t end, float* out, float* lse,
                            const int32_t* tokens) const;
    void write_out(const ops::AttendRow& whole, int t, std::span<const float* const> outs,
                   std::span<const float* const> lses, int group, int dim, DType dtype, float* lse) const;
    void begin_lists();
    void list_page(const pages::Row& row, int entry, PageId page);
    int list_selected(int first);
    void attend_lists(int layer, const AttendCall& call, int part, int first, std::span<const int32_t> rows);
    void select_pages(int layer, const AttendCall& call);
    void run_select(int layer, ops::SelectParams& p);
    void find_anchors(int reuse);
    bool follows(int layer, size_t first, const Sequence& s) const;
    void follow(int layer);
    void note_chosen(int layer);
    void refuse_unranked(int layer);
    void share_pages(int first, int rows);
    void estimate_rest(int layer, const AttendCall& call);
    void select_exactly(int layer, const AttendCall& call);
    std::vector<float> true_shares(int layer, const AttendCall& call, int r, int first);
    int audited_row(int rows) const;
    void audit(int layer, const AttendCall& call, int r);
    int zone_room(const pages::Row& row) const;
    void note_captured(const float* const* read, const float* rest, int group, const float* exact);
    void stream_row(int layer, const AttendCall& call, int r);
    void attend_now(int layer, const AttendCall& call, DType out_dtype);
    State state_of(PageId page) const { return kinds_[page_pool(page)].state; }
    const float* centre(const Sequence& s, int layer, int head) const;  // [D], or null: zeros
    void freeze_centre(Sequence& s, int layer, int head);
    void release(Sequence& s);
    void settle(int layer, Sequence& s, int64_t length);
    void crop_row(Sequence& s, int layer, int head, int64_t length);
    void views(PoolView* out);  // and what is queued for a device goes up
    void copy_tail(pages::Row& row, pages::Pool& pool, pages::Owner owner);
    void* workspace(int64_t bytes);
    void settle_workspace(int queries);
    int64_t base(const Sequence& s, int64_t length) const;

    std::vector<LayerShape> layers_;
    std::vector<int> first_row_;   // [L]
    std::vector<int> layer_pool_;  // [L]
    std::vector<int> pool_of_;     // [L, tiers, states]; -1: none
    std::vector<uint8_t> dense_;   // [L] nothing is selected, and all stays Near
    int n_rows_ = 0;               // rows of one sequence
    int n_indexed_ = 0;            // layers whose rows may be selected from
    Options options_;
    pages::Pools pools_;
    std::vector<PoolInfo> info_;
    std::vector<Kind> kinds_;                 // [pools]
    std::vector<FarSlabs> far_;               // [pools], those of Far ones are used
    std::vector<std::vector<PageId>> rings_;  // [pools], of Far ones: Near pages of the same format
    Mirror mirror_;
    uint64_t lent_ = 1;        // changes with the slabs
    std::vector<int> anchor_;  // [L] whose selection a layer reads: its own, or an earlier one's
    Chosen chosen_;
    Choose choose_;
    float mass_floor_ = 0.0f;
    Captured captured_;
    Audited audited_;
    int64_t hits_ = 0, misses_count_ = 0;
    int32_t clock_ = 0;  // steps that selected
    Ahead ahead_;
    int64_t moved_bytes_ = 0;
    uint32_t views_ = 0;  // that were set
    std::vector<Delivery> deliveries_;
    std::unordered_map<SeqId, std::unique_ptr<Sequence>> sequences_;
    SeqId next_ = 1;
    pages::Owner next_owner_ = pages::kCache + 1;
    bool recording_ = false;
    int threads_ = 1;

    bool open_ = false, laid_ = false;  // all layers have their tokens, whose bytes are to come
    int32_t longest_ = 0;
    std::vector<StepSequence> step_;
    std::vector<int32_t> tokens_;                  // index of each token along the T axis of the call's tensors
    std::vector<int32_t> token_pos_;               // its position
    std::vector<int32_t> done_;                    // [L] tokens of each sequence appended so far
    std::vector<QueryRing> staged_;                // [B, L] the step's own last queries, until it commits
    std::vector<std::vector<float>> staged_mass_;  // [B, rows][entries * 16], likewise

    std::vector<ops::AppendRow> append_rows_;  // scratch, kept between calls
    std::vector<ops::AttendRow> attend_rows_;
    std::vector<PageId> pages_;
    std::vector<uint8_t> slots_;
    Parts parts_;
    std::vector<float> logits_, lse_;  // of the rows of one call, for their mass
    std::vector<unsigned char> workspace_;
    size_t kept_workspace_ = 0;  // bytes that decoding needs
};

}  // namespace kvstrata::store
