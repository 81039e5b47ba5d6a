// The backends of every op. Only dispatch.cpp and dispatch_recall.cpp call them; it has checked the params by then.
#pragma once

#include "ops/accumulate.h"
#include "ops/append.h"
#include "ops/attend.h"
#include "ops/choose_chunks.h"
#include "ops/choose_states.h"
#include "ops/chunk_order.h"
#include "ops/cluster.h"
#include "ops/compact.h"
#include "ops/estimate.h"
#include "ops/mass.h"
#include "ops/measure.h"
#include "ops/merge.h"
#include "ops/pack.h"
#include "ops/pool.h"
#include "ops/quantize.h"
#include "ops/rotate.h"
#include "ops/score_keys.h"
#include "ops/score_max.h"
#include "ops/score_pages.h"
#include "ops/score_window.h"
#include "ops/summarize.h"

namespace kvstrata::cpu {

void append(const ops::AppendParams& params);
int64_t attend_workspace_bytes(const ops::AttendParams& params);
void attend(const ops::AttendParams& params);
void merge(const ops::MergeParams& params);
void mass(const ops::MassParams& params);
void pack(const ops::PackParams& params);
void unpack(const ops::PackParams& params);
void rotate(const ops::RotateParams& params);
void quantize(const ops::QuantizeParams& params);
void dequantize(const ops::DequantizeParams& params);
void compact(const ops::CompactParams& params);
int64_t score_window_workspace_bytes(const ops::ScoreWindowParams& params);
void score_window(const ops::ScoreWindowParams& params);
int64_t score_max_workspace_bytes(const ops::ScoreMaxParams& params);
void score_max(const ops::ScoreMaxParams& params);
int64_t measure_workspace_bytes(const ops::MeasureParams& params);
void measure(const ops::MeasureParams& params);
int64_t pool_workspace_bytes(const ops::PoolParams& params);
void pool(const ops::PoolParams& params);
void accumulate(const ops::AccumulateParams& params);
int64_t score_keys_workspace_bytes(const ops::ScoreKeysParams& params);
void score_keys(const ops::ScoreKeysParams& params);
int64_t choose_states_workspace_bytes(const ops::ChooseStatesParams& params);
void choose_states(const ops::ChooseStatesParams& params);
int64_t chunk_order_workspace_bytes(const ops::ChunkOrderParams& params);
void chunk_order(const ops::ChunkOrderParams& params);
int64_t choose_chunks_workspace_bytes(const ops::ChooseChunksParams& params);
void choose_chunks(const ops::ChooseChunksParams& params);
int64_t cluster_workspace_bytes(const ops::ClusterParams& params);
void cluster(const ops::ClusterParams& params);
int64_t cluster_greedy_workspace_bytes(const ops::ClusterParams& params);
void cluster_greedy(const ops::ClusterParams& params);
void summarize(const ops::SummarizeParams& params);
int64_t select_workspace_bytes(const ops::SelectParams& params);
void select(const ops::SelectParams& params);
void score_pages(const ops::SelectParams& params);
int64_t estimate_workspace_bytes(const ops::EstimateParams& params);
void estimate(const ops::EstimateParams& params);

}  // namespace kvstrata::cpu
