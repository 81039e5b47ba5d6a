// Slots in and out of pages of arrangement version 1 (common/layout.h). Bytes only; nothing is converted here.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

// K is words [words][16 slots]: a word is one f32 dim or two 16-bit dims, so one slot is one 32-bit column.
KV_INLINE void put_column(unsigned char* k, int slot, const void* row, int words) {
    uint32_t* column = reinterpret_cast<uint32_t*>(k) + slot;
    for (int i = 0; i < words; ++i) {
        uint32_t word;
        __builtin_memcpy(&word, static_cast<const char*>(row) + 4 * i, 4);
        column[i * kSlots] = word;
    }
}

KV_INLINE uint32_t half_word(const void* row, int i) {
    uint16_t h;
    __builtin_memcpy(&h, static_cast<const char*>(row) + 2 * i, 2);
    return h;
}

void put_slot(unsigned char* page, int32_t width, int32_t slot, const void* k, const void* v, int32_t dims) {
    const int64_t half = static_cast<int64_t>(kSlots) * dims * width;
    put_column(page, slot, k, dims * width / 4);
    unsigned char* const values = page + half;
    if (width == 4) {
        __builtin_memcpy(values + static_cast<int64_t>(slot) * dims * 4, v, static_cast<unsigned long>(dims) * 4);
        return;
    }
    uint32_t* line = reinterpret_cast<uint32_t*>(values) + slot / 2 * dims;  // two slots per word
    const uint32_t other = slot % 2 ? 0xFFFFu : 0xFFFF0000u;
    const int shift = slot % 2 ? 16 : 0;
    for (int d = 0; d < dims; ++d) line[d] = (line[d] & other) | half_word(v, d) << shift;
}

void put_page(unsigned char* page, int32_t width, const void* const* k, const void* const* v, int32_t dims) {
    const int64_t half = static_cast<int64_t>(kSlots) * dims * width;
    const int row_bytes = dims * width;
    int64_t at = 0;
    for (; at + 64 <= row_bytes; at += 64) transpose(k, at, page + at * kSlots);
    if (at < row_bytes) {  // 16-bit rows of an odd multiple of 16 dims end in half a line
        for (int slot = 0; slot < kSlots; ++slot) {
            put_column(page + at * kSlots, slot, static_cast<const char*>(k[slot]) + at, (row_bytes - at) / 4);
        }
    }
    unsigned char* const values = page + half;
    for (int slot = 0; slot < kSlots; ++slot) {
        if (width == 4) {
            __builtin_memcpy(values + static_cast<int64_t>(slot) * row_bytes, v[slot], row_bytes);
        } else if (slot % 2) {
            uint32_t* line = reinterpret_cast<uint32_t*>(values) + slot / 2 * dims;
            const void *first = v[slot - 1], *second = v[slot];
            for (int d = 0; d < dims; ++d) line[d] = half_word(first, d) | half_word(second, d) << 16;
        }
    }
}

void get_page(const unsigned char* page, int32_t width, void* const* k, void* const* v, int32_t dims) {
    const int64_t half = static_cast<int64_t>(kSlots) * dims * width;
    const int words = dims * width / 4;
    for (int slot = 0; slot < kSlots; ++slot) {
        const uint32_t* column = reinterpret_cast<const uint32_t*>(page) + slot;
        for (int i = 0; i < words; ++i) __builtin_memcpy(static_cast<char*>(k[slot]) + 4 * i, column + i * kSlots, 4);
        const unsigned char* const values = page + half;
        if (width == 4) {
            __builtin_memcpy(v[slot], values + static_cast<int64_t>(slot) * dims * 4,
                             static_cast<unsigned long>(dims) * 4);
            continue;
        }
        const uint32_t* line = reinterpret_cast<const uint32_t*>(values) + slot / 2 * dims;
        const int shift = slot % 2 ? 16 : 0;
        for (int d = 0; d < dims; ++d) {
            const uint16_t h = static_cast<uint16_t>(line[d] >> shift);
            __builtin_memcpy(static_cast<char*>(v[slot]) + 2 * d, &h, 2);
        }
    }
}

}  // namespace

void fill_pages(Kernels* table) {
    table->put_slot = put_slot;
    table->put_page = put_page;
    table->get_page = get_page;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_pages(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
