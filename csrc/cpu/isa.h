// Which instruction-set levels this machine has, and the kernels of the one in use.
#pragma once

#include <string>

#include "cpu/kernels.h"

namespace kvstrata::cpu {

enum class Isa : int { scalar = 0, avx2, avx512, avx512_vnni, avx512_bf16, amx };
inline constexpr int kIsaLevels = 6;

struct LevelInfo {
    const char* name;
    bool available;
    std::string reason;   // why not, if it is not
    const char* kernels;  // level whose kernels run when this one is in use: the next lower one that has its own
};

// All levels, lowest first. The first call asks the kernel for the AMX tile permission if the CPU has AMX.
const LevelInfo* levels();

// The level in use: the best available one, lowered by KVSTRATA_ISA or use_isa. Throws Invalid if KVSTRATA_ISA names a
// level that is unknown or not available here.
Isa active_isa();

// Uses a level from now on, whatever KVSTRATA_ISA says; the empty name goes back to the default. Throws Invalid.
// For tests and diagnosis: running calls keep the level that they began with.
void use_isa(const std::string& name);

const Kernels& kernels();

}  // namespace kvstrata::cpu
