// Which instruction-set levels this machine has, and the kernels of the one in use.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "cpu/kernels.h"

namespace kvstrata::cpu {

// amx_soft, in test builds only, is amx with tiles in plain code: it needs avx512_bf16, and is used where it is asked for.
enum class Isa : int { scalar = 0, avx2, avx512, avx512_vnni, avx512_bf16, amx, amx_soft };

struct LevelInfo {
    const char* name;
    bool available;
    std::string reason;   // why not, if it is not
    const char* kernels;  // level whose kernels run when this one is in use: the next lower one that has its own
};

// What a CPU and its operating system say of themselves, in words of cpuid.
struct CpuFacts {
    uint32_t basic_c;                 // leaf 1, ECX
    uint32_t more_b, more_c, more_d;  // leaf 7, EBX, ECX, EDX
    uint32_t sub_a;                   // leaf 7, subleaf 1, EAX
    uint64_t states;                  // XCR0: the register states that the system saves
    bool tiles_granted;               // to this process
};
// Why such a machine lacks a level, given that it has all below it; "" if it does not.
std::string obstacle(Isa level, const CpuFacts& cpu);

// All levels, lowest first. The first call asks the kernel for the AMX tile permission if the CPU has AMX.
std::span<const LevelInfo> levels();

// The level in use: the best available one that is used unasked, changed by KVSTRATA_ISA or use_isa. Throws Invalid if KVSTRATA_ISA names a
// level that is unknown or not available here.
Isa active_isa();

// Uses a level from now on, whatever KVSTRATA_ISA says; the empty name goes back to the default. Throws Invalid.
// For tests and diagnosis: running calls keep the level that they began with.
void use_isa(const std::string& name);

const Kernels& kernels();

}  // namespace kvstrata::cpu
