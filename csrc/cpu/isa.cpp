#include "cpu/isa.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "common/check.h"
#include "ops/settings.h"

#if defined(KVSTRATA_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvstrata::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx", "amx_soft"};
#if defined(KVSTRATA_SOFT_TILES)
constexpr int kLevels = 7;
#else
constexpr int kLevels = 6;
#endif

#if defined(KVSTRATA_X86)
struct Cpuid {
    unsigned a = 0, b = 0, c = 0, d = 0;
    Cpuid(unsigned leaf, unsigned sub) {
        if (!__get_cpuid_count(leaf, sub, &a, &b, &c, &d)) a = b = c = d = 0;
    }
};

bool bit(unsigned word, int n) { return word >> n & 1; }

// XCR0: which register states the operating system saves. Only to be asked if cpuid says OSXSAVE.
uint64_t saved_states() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

// Linux hands out the 8 KiB tile state per process and on request (ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool tiles_granted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

bool has_tiles(const CpuFacts& cpu) { return bit(cpu.more_d, 22) && bit(cpu.more_d, 24) && bit(cpu.more_d, 25); }
bool saves_tiles(const CpuFacts& cpu) { return (cpu.states >> 17 & 3) == 3; }

CpuFacts this_cpu() {
    const Cpuid basic(1, 0), more(7, 0), sub(7, 1);
    CpuFacts cpu{basic.c, more.b, more.c, more.d, sub.a, bit(basic.c, 27) ? saved_states() : 0, false};
    cpu.tiles_granted = has_tiles(cpu) && saves_tiles(cpu) && tiles_granted();
    return cpu;
}

std::string missing(bool present, const char* what) { return present ? "" : std::string("the CPU has no ") + what; }
#else
CpuFacts this_cpu() { return {}; }
#endif

void fill(Isa level, Kernels* table) {
#define KVSTRATA_FILL(name)                    \
    case Isa::name:                            \
        name::fill_attend(table);              \
        name::fill_attend_matrix_codes(table); \
        name::fill_attend_matrix_pairs(table); \
        name::fill_attend_pairs(table);        \
        name::fill_attend_quantized(table);    \
        name::fill_bounds(table);              \
        name::fill_clusters(table);            \
        name::fill_elements(table);            \
        name::fill_encode(table);              \
        name::fill_groups(table);              \
        name::fill_keys(table);                \
        name::fill_pages(table);               \
        name::fill_pool(table);                \
        name::fill_ranks(table);               \
        name::fill_rotate(table);              \
        name::fill_scores(table);              \
        name::fill_slots(table);               \
        name::fill_split(table);               \
        name::fill_summaries(table);           \
        name::fill_values(table);              \
        name::fill_window(table);              \
        name::fill_window_pairs(table);        \
        name::fill_window_quantized(table);    \
        break
    switch (level) {
        KVSTRATA_FILL(scalar);
#if defined(KVSTRATA_X86)
        KVSTRATA_FILL(avx2);
        KVSTRATA_FILL(avx512);
        KVSTRATA_FILL(avx512_vnni);
        KVSTRATA_FILL(avx512_bf16);
        KVSTRATA_FILL(amx);
#endif
#if defined(KVSTRATA_SOFT_TILES)
        KVSTRATA_FILL(amx_soft);
#endif
        default: break;
    }
#undef KVSTRATA_FILL
}

bool same(const Kernels& a, const Kernels& b) {  // as far as attend goes
    return std::equal(a.attend_block, std::end(a.attend_block), b.attend_block) &&
           std::equal(a.attend_matrix, std::end(a.attend_matrix), b.attend_matrix);
}

struct Levels {
    std::array<LevelInfo, kLevels> info;
    std::array<Kernels, kLevels> tables{};

    // A level's fill function is compiled for that level, so it only runs where the level is available.
    Levels() {
        const CpuFacts cpu = this_cpu();
        for (int i = 0; i < kLevels; ++i) {
            const Isa level = static_cast<Isa>(i);
            const int below = level == Isa::amx_soft ? static_cast<int>(Isa::avx512_bf16) : i - 1;
            std::string reason;
            if (i && !info[below].available) {
                reason = info[below].reason;
                if (!reason.starts_with("needs ")) reason = std::string("needs ") + kNames[below] + ": " + reason;
            } else {
                reason = obstacle(level, cpu);
            }
            info[i] = {kNames[i], reason.empty(), reason, i ? info[below].kernels : kNames[0]};
            if (!info[i].available) continue;
            if (i) tables[i] = tables[below];
            fill(level, &tables[i]);
            // A level's own kernels attend, if they do anything.
            if (i == 0 || !same(tables[i], tables[below])) info[i].kernels = kNames[i];
        }
    }
};

const Levels& all() {
    static const Levels once;
    return once;
}

Isa parse(const std::string& name, const char* source) {
    for (int i = 0; i < kLevels; ++i) {
        if (name != kNames[i]) continue;
        const LevelInfo& level = all().info[i];
        check(level.available, source, " is ", name, ", which is not available here: ", level.reason);
        return static_cast<Isa>(i);
    }
    std::string known;
    for (const LevelInfo& level : all().info) known += (known.empty() ? "" : ", ") + std::string(level.name);
    throw Invalid(message(source, " is ", name, ", expected one of ", known));
}

// The best level that is used unasked. amx is not, until it has run on a CPU that has it: KVSTRATA_ISA=amx asks for it.
Isa best() {
    int i = static_cast<int>(Isa::avx512_bf16);
    while (!all().info[i].available) --i;
    return static_cast<Isa>(i);
}

Isa standard() {
    const std::string& wanted = settings().isa;
    return wanted.empty() ? best() : parse(wanted, "KVSTRATA_ISA");
}

std::atomic<int> active{-1};  // -1: not chosen yet

}  // namespace

#if defined(KVSTRATA_X86)
std::string obstacle(Isa level, const CpuFacts& cpu) {
    switch (level) {
        case Isa::scalar:
        case Isa::amx_soft: return "";
        case Isa::avx2:
            if ((cpu.states & 0x6) != 0x6) return "the operating system does not save AVX registers";
            return missing(bit(cpu.more_b, 5) && bit(cpu.basic_c, 12) && bit(cpu.basic_c, 29), "AVX2, FMA and F16C");
        case Isa::avx512:
            if ((cpu.states & 0xE6) != 0xE6) return "the CPU or the operating system has no AVX-512 state";
            return missing(bit(cpu.more_b, 16) && bit(cpu.more_b, 17) && bit(cpu.more_b, 30) && bit(cpu.more_b, 31),
                           "AVX-512 F, DQ, BW and VL");
        case Isa::avx512_vnni: return missing(bit(cpu.more_c, 11), "AVX512-VNNI");
        case Isa::avx512_bf16: return missing(bit(cpu.sub_a, 5), "AVX512-BF16");
        case Isa::amx:
            if (!has_tiles(cpu)) return "the CPU has no AMX-TILE, -BF16 and -INT8";
            if (!saves_tiles(cpu)) return "the operating system does not save AMX tiles";
            return cpu.tiles_granted ? "" : "the operating system refused the AMX tile permission";
    }
    return "";
}
#else
std::string obstacle(Isa level, const CpuFacts&) {
    return level == Isa::scalar ? "" : "not built for this architecture";
}
#endif

std::span<const LevelInfo> levels() { return all().info; }

Isa active_isa() {
    int level = active.load(std::memory_order_acquire);
    if (level < 0) {
        level = static_cast<int>(standard());
        active.store(level, std::memory_order_release);
    }
    return static_cast<Isa>(level);
}

void use_isa(const std::string& name) {
    active.store(static_cast<int>(name.empty() ? standard() : parse(name, "set_isa: level")),
                 std::memory_order_release);
}

const Kernels& kernels() { return all().tables[static_cast<int>(active_isa())]; }

}  // namespace kvstrata::cpu
