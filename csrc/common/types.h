// The words of the engine as types: formats, data types, tiers, states and page ids.
//
// This header depends on nothing and is the only one that kernels compiled per instruction set may share with the rest:
// it holds plain integers and constexpr functions, no standard container and no function with a linkable body.
#pragma once

#include <cstdint>

namespace kvstrata {

// Slots in a page. Named once, here; every layout, mask width (uint16_t) and tile size follows from it.
inline constexpr int kSlots = 16;
inline constexpr uint16_t kAllSlots = 0xFFFF;

// How a page stores its slots. The values are part of saved files.
enum class Format : uint8_t { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, int4 = 4, int2 = 5 };

// Element type of a tensor that crosses the border.
enum class DType : uint8_t { f32 = 0, bf16 = 1, f16 = 2, u8 = 3, u16 = 4, i32 = 5, i64 = 6, u64 = 7, i8 = 8 };

enum class Device : uint8_t { cpu = 0, cuda = 1 };

// Where an op runs. On CUDA it joins the work of a stream.
struct Where {
    Device device = Device::cpu;
    int32_t index = 0;       // of the CUDA device
    void* stream = nullptr;  // the raw cudaStream_t of the caller

    constexpr bool on_host() const { return device == Device::cpu; }  // what pointers name can be read here
};

enum class Tier : uint8_t { near = 0, far = 1 };

// The state column of a plan (u8): what a token is stored as.
enum class State : uint8_t { evicted = 0, full = 1, int8 = 2, int4 = 3, int2 = 4 };

// What a summary says of its page. mean: where its keys lie and how widely; bounds: their least and largest value in every
// channel; mean_value: mean, and the mean of its values; halves, quarters: where the keys of two, of four
// parts of it lie and how widely.
enum class SummaryKind : uint8_t { mean = 0, bounds = 1, mean_value = 2, halves = 3, quarters = 4 };

// A page id is an int32: 3 bits pool, 12 bits slab, 16 bits page in the slab. -1, the only negative id, means "skip".
using PageId = int32_t;
inline constexpr PageId kNoPage = -1;
inline constexpr int kPoolBits = 3, kSlabBits = 12, kIndexBits = 16;
inline constexpr int kMaxPools = 1 << kPoolBits;
inline constexpr int kMaxSlabs = 1 << kSlabBits;
inline constexpr int kMaxPagesPerSlab = 1 << kIndexBits;

constexpr PageId make_page(int pool, int slab, int index) {
    return static_cast<PageId>((pool << (kSlabBits + kIndexBits)) | (slab << kIndexBits) | index);
}
constexpr int page_pool(PageId id) { return id >> (kSlabBits + kIndexBits); }
constexpr int page_slab(PageId id) { return (id >> kIndexBits) & (kMaxSlabs - 1); }
constexpr int page_index(PageId id) { return id & (kMaxPagesPerSlab - 1); }

// Width of an element of a full format, or of a tensor type, in bytes.
constexpr int format_bytes(Format f) { return f == Format::f32 ? 4 : 2; }
constexpr bool is_full(Format f) { return f <= Format::f16; }
// Width of an element, or of a code, of any format in bits.
constexpr int format_bits(Format f) {
    switch (f) {
        case Format::f32: return 32;
        case Format::bf16:
        case Format::f16: return 16;
        case Format::int8: return 8;
        case Format::int4: return 4;
        default: return 2;
    }
}
constexpr int dtype_bytes(DType t) {
    switch (t) {
        case DType::u8:
        case DType::i8: return 1;
        case DType::bf16:
        case DType::f16:
        case DType::u16: return 2;
        case DType::f32:
        case DType::i32: return 4;
        default: return 8;
    }
}

}  // namespace kvstrata
