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

constexpr const char* kNames[kIsaLevels] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};

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

std::string missing(bool present, const char* what) { return present ? "" : std::string("the CPU has no ") + what; }

// Why a level is not available, given that all below it are; "" if it is.
std::string obstacle(Isa level) {
    const Cpuid basic(1, 0), more(7, 0), sub(7, 1);
    const uint64_t states = bit(basic.c, 27) ? saved_states() : 0;
    switch (level) {
        case Isa::scalar: return "";
        case Isa::avx2:
            if ((states & 0x6) != 0x6) return "the operating system does not save AVX registers";
            return missing(bit(more.b, 5) && bit(basic.c, 12) && bit(basic.c, 29), "AVX2, FMA and F16C");
        case Isa::avx512:
            if ((states & 0xE6) != 0xE6) return "the CPU or the operating system has no AVX-512 state";
            return missing(bit(more.b, 16) && bit(more.b, 17) && bit(more.b, 30) && bit(more.b, 31),
                           "AVX-512 F, DQ, BW and VL");
        case Isa::avx512_vnni: return missing(bit(more.c, 11), "AVX512-VNNI");
        case Isa::avx512_bf16: return missing(bit(sub.a, 5), "AVX512-BF16");
        case Isa::amx:
            if (!(bit(more.d, 22) && bit(more.d, 24) && bit(more.d, 25)))
                return "the CPU has no AMX-TILE, -BF16 and -INT8";
            if ((states >> 17 & 3) != 3) return "the operating system does not save AMX tiles";
            return tiles_granted() ? "" : "the operating system refused the AMX tile permission";
    }
    return "";
}
#else
std::string obstacle(Isa level) { return level == Isa::scalar ? "" : "not built for this architecture"; }
#endif

void fill(Isa level, Kernels* table) {
#define KVSTRATA_FILL(name)                 \
    case Isa::name:                         \
        name::fill_attend(table);           \
        name::fill_attend_pairs(table);     \
        name::fill_attend_quantized(table); \
        name::fill_bounds(table);           \
        name::fill_clusters(table);         \
        name::fill_elements(table);         \
        name::fill_encode(table);           \
        name::fill_groups(table);           \
        name::fill_keys(table);             \
        name::fill_pages(table);            \
        name::fill_pool(table);             \
        name::fill_ranks(table);            \
        name::fill_rotate(table);           \
        name::fill_scores(table);           \
        name::fill_slots(table);            \
        name::fill_split(table);            \
        name::fill_summaries(table);        \
        name::fill_values(table);           \
        name::fill_window(table);           \
        name::fill_window_pairs(table);     \
        name::fill_window_quantized(table); \
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
        default: break;
    }
#undef KVSTRATA_FILL
}

struct Levels {
    std::array<LevelInfo, kIsaLevels> info;
    std::array<Kernels, kIsaLevels> tables{};

    // A level's fill function is compiled for that level, so it only runs where the level is available.
    Levels() {
        std::string below;
        for (int i = 0; i < kIsaLevels; ++i) {
            std::string reason = below.empty() ? obstacle(static_cast<Isa>(i)) : below;
            const bool available = reason.empty();
            info[i] = {kNames[i], available, reason, i ? info[i - 1].kernels : kNames[0]};
            if (available) {
                if (i) tables[i] = tables[i - 1];
                fill(static_cast<Isa>(i), &tables[i]);
                const auto& block = tables[i].attend_block;  // a level's own kernels attend, if they do anything
                const bool own = i == 0 || !std::equal(block, block + std::size(block), tables[i - 1].attend_block);
                if (own) info[i].kernels = kNames[i];
            } else if (below.empty()) {
                below = std::string("needs ") + kNames[i] + ": " + reason;
            }
        }
    }
};

const Levels& all() {
    static const Levels once;
    return once;
}

Isa parse(const std::string& name, const char* source) {
    for (int i = 0; i < kIsaLevels; ++i) {
        if (name != kNames[i]) continue;
        const LevelInfo& level = all().info[i];
        check(level.available, source, " is ", name, ", which is not available here: ", level.reason);
        return static_cast<Isa>(i);
    }
    std::string known;
    for (const char* n : kNames) known += (known.empty() ? "" : ", ") + std::string(n);
    throw Invalid(message(source, " is ", name, ", expected one of ", known));
}

Isa best() {
    int i = kIsaLevels - 1;
    while (!all().info[i].available) --i;
    return static_cast<Isa>(i);
}

Isa standard() {
    const std::string& wanted = settings().isa;
    return wanted.empty() ? best() : parse(wanted, "KVSTRATA_ISA");
}

std::atomic<int> active{-1};  // -1: not chosen yet

}  // namespace

const LevelInfo* levels() { return all().info.data(); }

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
