// Every op by name, for those who do something with each: KV_OP(name, params).
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
#include "ops/summarize_groups.h"

#define KV_OPS(KV_OP)                              \
    KV_OP(accumulate, AccumulateParams)            \
    KV_OP(append, AppendParams)                    \
    KV_OP(attend, AttendParams)                    \
    KV_OP(choose_chunks, ChooseChunksParams)       \
    KV_OP(choose_states, ChooseStatesParams)       \
    KV_OP(chunk_order, ChunkOrderParams)           \
    KV_OP(cluster, ClusterParams)                  \
    KV_OP(cluster_greedy, ClusterParams)           \
    KV_OP(compact, CompactParams)                  \
    KV_OP(dequantize, DequantizeParams)            \
    KV_OP(estimate, EstimateParams)                \
    KV_OP(mass, MassParams)                        \
    KV_OP(measure, MeasureParams)                  \
    KV_OP(merge, MergeParams)                      \
    KV_OP(pack, PackParams)                        \
    KV_OP(pool, PoolParams)                        \
    KV_OP(quantize, QuantizeParams)                \
    KV_OP(rotate, RotateParams)                    \
    KV_OP(score_keys, ScoreKeysParams)             \
    KV_OP(score_max, ScoreMaxParams)               \
    KV_OP(score_pages, SelectParams)               \
    KV_OP(score_window, ScoreWindowParams)         \
    KV_OP(select, SelectParams)                    \
    KV_OP(summarize, SummarizeParams)              \
    KV_OP(summarize_groups, SummarizeGroupsParams) \
    KV_OP(unpack, PackParams)

// Of them, those that work in memory of the caller.
#define KV_OPS_IN_WORKSPACE(KV_OP)           \
    KV_OP(attend, AttendParams)              \
    KV_OP(choose_chunks, ChooseChunksParams) \
    KV_OP(choose_states, ChooseStatesParams) \
    KV_OP(chunk_order, ChunkOrderParams)     \
    KV_OP(cluster, ClusterParams)            \
    KV_OP(cluster_greedy, ClusterParams)     \
    KV_OP(estimate, EstimateParams)          \
    KV_OP(measure, MeasureParams)            \
    KV_OP(pool, PoolParams)                  \
    KV_OP(score_keys, ScoreKeysParams)       \
    KV_OP(score_max, ScoreMaxParams)         \
    KV_OP(score_window, ScoreWindowParams)   \
    KV_OP(select, SelectParams)
