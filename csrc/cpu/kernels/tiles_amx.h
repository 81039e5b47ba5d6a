// Tiles by AMX-TILE, -BF16 and -INT8.
//
// The instructions stand here as assembly, because GCC 12's own intrinsics do not tell the compiler which memory they read:
// what was just written for a tile could still be in a register, or be dropped.
#pragma once

namespace kvstrata::cpu::KV_ISA {
namespace {

// What ldtilecfg reads.
struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

struct Tiles {
    int rows = 0, depth = 0;

    // Shapes, both 1..16, from here on; if they are new, what tiles held is lost.
    KV_INLINE_MEMBER void shape(int new_rows, int new_depth) {
        if (new_rows == rows && new_depth == depth) return;
        rows = new_rows;
        depth = new_depth;
        TileConfig config{};
        config.palette = 1;
        for (int i = 0; i < 8; ++i) {
            config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : depth);
            config.bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 4 * depth : 64);
        }
        __asm__ volatile("ldtilecfg %0" : : "m"(config));
    }
    // Other libraries use them too, and a context switch is dearer while they are in use.
    KV_INLINE_MEMBER ~Tiles() { __asm__ volatile("tilerelease"); }
};

// Rows `apart` bytes from each other.
template <int Tile>
KV_INLINE void load(Tiles&, const void* from, int64_t apart) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(apart), "i"(Tile) : "memory");
}
template <int Tile>
KV_INLINE void store(Tiles&, void* to, int64_t apart) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(apart), "i"(Tile) : "memory");
}
template <int Tile>
KV_INLINE void clear(Tiles&) {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(Tile));
}
// Sums += left . right of pairs of bf16 in f32; denormal numbers count as 0.
template <int Sums, int Left, int Right>
KV_INLINE void multiply_pairs(Tiles&) {
    static_assert(kProduct<Sums, Left, Right>);
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Left), "i"(Right));
}
// Sums += left . right of signed bytes in int32.
template <int Sums, int Left, int Right>
KV_INLINE void multiply_bytes(Tiles&) {
    static_assert(kProduct<Sums, Left, Right>);
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Left), "i"(Right));
}

}  // namespace
}  // namespace kvstrata::cpu::KV_ISA
