// The backends of every op. Only dispatch.cpp calls them; it has checked the params by then.
#pragma once

#include "ops/append.h"
#include "ops/attend.h"
#include "ops/compact.h"
#include "ops/mass.h"
#include "ops/merge.h"
#include "ops/pack.h"
#include "ops/quantize.h"
#include "ops/rotate.h"

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

}  // namespace kvstrata::cpu
