// The backends of every op. Only dispatch.cpp calls them; it has checked the params by then.
#pragma once

#include "ops/append.h"
#include "ops/attend.h"
#include "ops/mass.h"
#include "ops/merge.h"
#include "ops/pack.h"

namespace kvstrata::cpu {

void append(const ops::AppendParams& params);
int64_t attend_workspace_bytes(const ops::AttendParams& params);
void attend(const ops::AttendParams& params);
void merge(const ops::MergeParams& params);
void mass(const ops::MassParams& params);
void pack(const ops::PackParams& params);
void unpack(const ops::PackParams& params);

}  // namespace kvstrata::cpu
