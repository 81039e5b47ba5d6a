// The border of the ops of recall, as dispatch.cpp is that of the others.
#include <cmath>

#include "ops/backends.h"
#include "ops/border.h"

namespace kvstrata::ops {
namespace {

void check_kind(const char* op, SummaryKind kind) {
    check(kind <= SummaryKind::quarters, op, ": kind is ", static_cast<int>(kind),
          ", expected mean, bounds, mean_value, halves or quarters");
}

void check_cluster(const char* op, const ClusterParams& p) {
    check_shape(op, p.head_dim);
    for (int r = 0; r < p.n_rows; ++r) {
        check(p.rows[r].tokens >= 0 && p.rows[r].tokens <= kMaxClusterTokens, op, ": row ", r, " has ",
              p.rows[r].tokens, " tokens, expected at most ", kMaxClusterTokens);
    }
}

// What every scan of summaries says of itself.
template <class Params>
void check_scan(const char* op, const Params& p) {
    check_quantizable(op, p.head_dim);
    check_shape(op, p.head_dim, p.group);
    check_float(op, "q", p.q_dtype);
    check(std::isfinite(p.scale), op, ": scale is ", p.scale, ", expected a finite number");
    check(p.weight >= 0 && std::isfinite(p.weight), op, ": spread_weight is ", p.weight, ", expected 0 or more");
    check(p.softcap >= 0 && std::isfinite(p.softcap), op, ": softcap is ", p.softcap, ", expected 0 (none) or more");
}

}  // namespace

int64_t cluster_workspace_bytes(const ClusterParams& p, const Where& where) {
    check_shape("cluster", p.head_dim);
    return where.on_host() ? cpu::cluster_workspace_bytes(p) : cuda::cluster_workspace_bytes(p);
}

void cluster(const ClusterParams& p, const Where& where) {
    check_cluster("cluster", p);
    check(p.iters >= 0, "cluster: iters is ", p.iters, ", expected at least 0");
    where.on_host() ? cpu::cluster(p) : cuda::cluster(p, where);
}

int64_t cluster_greedy_workspace_bytes(const ClusterParams& p, const Where& where) {
    check_shape("cluster_greedy", p.head_dim);
    return where.on_host() ? cpu::cluster_greedy_workspace_bytes(p) : cuda::cluster_greedy_workspace_bytes(p);
}

void cluster_greedy(const ClusterParams& p, const Where& where) {
    check_cluster("cluster_greedy", p);
    where.on_host() ? cpu::cluster_greedy(p) : cuda::cluster_greedy(p, where);
}

void summarize(const SummarizeParams& p, const Where& where) {
    check_quantizable("summarize", p.head_dim);
    check_kind("summarize", p.kind);
    for (int i = 0; checks_ids(where) && i < p.n_items; ++i) {
        if (p.items[i].page >= 0 && p.items[i].visible) check_page("summarize", p.pools, p.items[i].page, i, 0);
    }
    where.on_host() ? cpu::summarize(p) : cuda::summarize(p, where);
}

void summarize_groups(const SummarizeGroupsParams& p, const Where& where) {
    check_quantizable("summarize_groups", p.head_dim);
    where.on_host() ? cpu::summarize_groups(p) : cuda::summarize_groups(p, where);
}

int64_t select_workspace_bytes(const SelectParams& p, const Where& where) {
    return where.on_host() ? cpu::select_workspace_bytes(p) : cuda::select_workspace_bytes(p);
}

static void check_select(const char* op, const SelectParams& p) {
    check_scan(op, p);
    check_kind(op, p.kind);
    check(p.kind != SummaryKind::bounds || p.scale >= 0, op, ": scale is ", p.scale,
          ", expected 0 or more for kind bounds");
}

static void check_select_row(const SelectParams& p, int r, const Where& where) {
    const SelectRow& row = p.rows[r];
    check(row.most >= 0, "select: k[", r, "] is ", row.most, ", expected at least 0");
    check(!row.zone || p.kind == SummaryKind::mean_value, "select: kind is ", name(p.kind),
          ", expected mean_value for a zone");
    if (row.group_blocks) {
        check(where.on_host(), "select: groups are given, expected none on a device");
        check(has_groups(p.kind), "select: kind is ", name(p.kind), ", expected mean or mean_value for groups");
        check(row.groups >= 0 && row.groups <= row.entries / kGroupPages, "select: groups of row ", r, " is ",
              row.groups, ", expected 0 to ", row.entries / kGroupPages);
        check(!row.x, "select: x of row ", r, " is wanted, expected none with groups");
        check(row.expand >= 1, "select: expand of row ", r, " is ", row.expand, ", expected at least 1 group");
    }
    check(row.zone_most >= 0, "select: zone_most of row ", r, " is ", row.zone_most, ", expected at least 0");
    for (int g = 0; where.on_host() && row.lse_base && g < p.group; ++g) {
        const float base = row.lse_base[g];
        check(base < HUGE_VALF, "select: lse_base[", r, ", ", g, "] is ", base, ", expected a finite number or -inf");
    }
}

void select(const SelectParams& p, const Where& where) {
    check_select("select", p);
    check(p.aggregate <= Aggregate::max, "select: aggregate is ", static_cast<int>(p.aggregate),
          ", expected sum or max");
    check(p.mass >= 0 && p.mass <= 1, "select: mass is ", p.mass, ", expected 0 to 1");
    check(p.mass == 0 || p.aggregate == Aggregate::sum, "select: aggregate is max, expected sum with a mass");
    check(p.least >= 0, "select: least is ", p.least, ", expected at least 0");
    for (int r = 0; r < p.n_rows; ++r) check_select_row(p, r, where);
    where.on_host() ? cpu::select(p) : cuda::select(p, where);
}

void score_pages(const SelectParams& p, const Where& where) {
    check_select("score_pages", p);
    where.on_host() ? cpu::score_pages(p) : cuda::score_pages(p, where);
}

int64_t estimate_workspace_bytes(const EstimateParams& p, const Where& where) {
    return where.on_host() ? cpu::estimate_workspace_bytes(p) : cuda::estimate_workspace_bytes(p);
}

void estimate(const EstimateParams& p, const Where& where) {
    check_scan("estimate", p);
    for (int r = 0; where.on_host() && r < p.n_rows; ++r) {
        const EstimateRow& row = p.rows[r];
        for (int i = 0, least = 0; i < row.zone_count; least = row.zone[i++] + 1) {
            check(row.zone[i] >= least && row.zone[i] < row.entries, "estimate: zone[", r, ", ", i, "] is ",
                  row.zone[i], ", expected ", least, " to ", row.entries - 1, " (rising entries)");
        }
    }
    where.on_host() ? cpu::estimate(p) : cuda::estimate(p, where);
}

}  // namespace kvstrata::ops
