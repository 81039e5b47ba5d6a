// Single slots in and out of pages of any format, and codes of quantized pages (arrangement version 1, common/layout.h).
//
// K of a slot is a column of 32-bit words; V of a slot is one bit field in D successive words. Bytes only.
#include "cpu/kernels/level.h"
#if KV_OWN_KERNELS
#include "common/layout.h"
#include "cpu/kernels/vec.h"

namespace kvstrata::cpu::KV_ISA {
namespace {

// Where V of a slot lies: bits `mask << shift` of the D words of one run of lines.
struct Field {
    int run, shift;
};
template <int Bits>
KV_INLINE Field field_of(int slot) {
    if constexpr (Bits >= 8) return {slot * Bits / 32, slot * Bits % 32};
    constexpr int kPerByte = 8 / (Bits < 8 ? Bits : 8);
    return {slot / (4 * kPerByte), 8 * (slot % 4) + Bits * (slot / 4 % kPerByte)};
}
template <int Bits>
constexpr uint32_t kMask = Bits == 32 ? ~0u : (1u << (Bits % 32)) - 1;
template <int Bits>
constexpr uint32_t kByteMask = Bits == 2   ? 0x03030303u
                               : Bits == 4 ? 0x0F0F0F0Fu
                                           : ~0u;

template <int Bits>
KV_INLINE int64_t half_page(int dim) {
    return static_cast<int64_t>(kSlots) * dim * Bits / 8;
}
KV_INLINE uint32_t word_at(const void* p, int i) {
    uint32_t word;
    __builtin_memcpy(&word, static_cast<const char*>(p) + 4 * i, 4);
    return word;
}

template <int Bits>
void copy_slot(unsigned char* to, int to_slot, const unsigned char* from, int slot, int dim, int scales) {
    const uint32_t* k = reinterpret_cast<const uint32_t*>(from) + slot;
    uint32_t* k_to = reinterpret_cast<uint32_t*>(to) + to_slot;
    for (int i = 0; i < dim * Bits / 32; ++i) k_to[i * kSlots] = k[i * kSlots];
    const int64_t half = half_page<Bits>(dim);
    const Field source = field_of<Bits>(slot), target = field_of<Bits>(to_slot);
    const uint32_t* v = reinterpret_cast<const uint32_t*>(from + half) + source.run * dim;
    uint32_t* __restrict v_to = reinterpret_cast<uint32_t*>(to + half) + target.run * dim;
    const uint32_t keep = ~(kMask<Bits> << target.shift);
    for (int d = 0; d < dim; ++d) {
        v_to[d] = (v_to[d] & keep) | (v[d] >> source.shift & kMask<Bits>) << target.shift;
    }
    const uint16_t* s = reinterpret_cast<const uint16_t*>(from + 2 * half) + slot;
    uint16_t* s_to = reinterpret_cast<uint16_t*>(to + 2 * half) + to_slot;
    for (int i = 0; i < scales; ++i) s_to[i * kSlots] = s[i * kSlots];
}

// Elements of a slot of a full page.
template <int Bits>
void get_slot(const unsigned char* page, int slot, int dim, void* k, void* v) {
    const uint32_t* column = reinterpret_cast<const uint32_t*>(page) + slot;
    uint32_t* __restrict words = static_cast<uint32_t*>(k);
    for (int i = 0; i < dim * Bits / 32; ++i) words[i] = column[i * kSlots];
    const Field field = field_of<Bits>(slot);
    const uint32_t* line = reinterpret_cast<const uint32_t*>(page + half_page<Bits>(dim)) + field.run * dim;
    if constexpr (Bits == 32) {
        __builtin_memcpy(v, line, static_cast<unsigned long>(dim) * 4);
    } else {
        uint16_t* __restrict out = static_cast<uint16_t*>(v);
        for (int d = 0; d < dim; ++d) out[d] = static_cast<uint16_t>(line[d] >> field.shift);
    }
}

// A field of Bits bits as an i8: int8 and int4 are signed, int2 is 0..3.
template <int Bits>
KV_INLINE unsigned char code_of(uint32_t field) {
    const uint32_t c = field & kMask<Bits>;
    return static_cast<unsigned char>(Bits == 4 ? (c ^ 8u) - 8u : c);
}

template <int Bits>
void get_codes(const unsigned char* page, int slot, int dim, unsigned char* k, unsigned char* v) {
    constexpr int kPerByte = 8 / Bits;
    const uint32_t* column = reinterpret_cast<const uint32_t*>(page) + slot;
    for (int p = 0; p < dim / (4 * kPerByte); ++p) {
        const uint32_t word = column[p * kSlots];
        for (int q = 0; q < kPerByte; ++q) {
            uint32_t four = word >> (Bits * q) & kByteMask<Bits>;
            if constexpr (Bits == 4) {  // minus 8 where the sign bit is set: it is set again in the bits above
                const uint32_t negative = four & 0x08080808u;
                four |= (negative << 1) | (negative << 2) | (negative << 3) | (negative << 4);
            }
            __builtin_memcpy(k + 4 * (p * kPerByte + q), &four, 4);
        }
    }
    const Field field = field_of<Bits>(slot);
    const uint32_t* line = reinterpret_cast<const uint32_t*>(page + half_page<Bits>(dim)) + field.run * dim;
    unsigned char* __restrict out = v;
    for (int d = 0; d < dim; ++d) out[d] = code_of<Bits>(line[d] >> field.shift);
}

// Codes of one vector as the words of its K column.
template <int Bits>
KV_INLINE void pack_words(const unsigned char* codes, int dim, uint32_t* words) {
    constexpr int kPerByte = 8 / Bits;
    for (int p = 0; p < dim / (4 * kPerByte); ++p) {
        uint32_t word = 0;
        for (int q = 0; q < kPerByte; ++q) word |= (word_at(codes, p * kPerByte + q) & kByteMask<Bits>) << (Bits * q);
        words[p] = word;
    }
}

// K and V of the slots in `slots` from codes [16, stride]; the others keep their bytes.
template <int Bits>
KV_INLINE void put_k(unsigned char* page, int dim, uint16_t slots, const unsigned char* codes, int stride) {
    alignas(64) uint32_t words[kSlots][kMaxHeadDim / 4];
    const void* rows[kSlots];
    const int count = dim * Bits / 32;
    for (int slot = 0; slot < kSlots; ++slot) {
        rows[slot] = words[slot];
        if (slots >> slot & 1) pack_words<Bits>(codes + slot * stride, dim, words[slot]);
    }
    int i = 0;
    if (slots == kAllSlots) {
        for (; i + 16 <= count; i += 16) transpose(rows, 4 * i, page + 64 * i);
    }
    for (int slot = 0; slot < kSlots; ++slot) {
        if (!(slots >> slot & 1)) continue;
        uint32_t* column = reinterpret_cast<uint32_t*>(page) + slot;
        for (int j = i; j < count; ++j) column[j * kSlots] = words[slot][j];
    }
}

template <int Bits>
KV_INLINE void put_v(uint32_t* v, int dim, uint16_t slots, const unsigned char* codes, int stride) {
    for (int slot = 0; slot < kSlots; ++slot) {
        if (!(slots >> slot & 1)) continue;
        const Field field = field_of<Bits>(slot);
        const uint32_t keep = ~(kMask<Bits> << field.shift);
        const unsigned char* row = codes + slot * stride;
        uint32_t* __restrict line = v + field.run * dim;
        for (int d = 0; d < dim; ++d) line[d] = (line[d] & keep) | (row[d] & kMask<Bits>) << field.shift;
    }
}

template <int Bits>
void put_codes(unsigned char* page, int dim, uint16_t slots, const unsigned char* k, const unsigned char* v,
               int stride) {
    put_k<Bits>(page, dim, slots, k, stride);
    put_v<Bits>(reinterpret_cast<uint32_t*>(page + half_page<Bits>(dim)), dim, slots, v, stride);
}

}  // namespace

void fill_slots(Kernels* table) {
    table->copy_slot[0] = copy_slot<32>;
    table->copy_slot[1] = table->copy_slot[2] = copy_slot<16>;
    table->copy_slot[3] = copy_slot<8>;
    table->copy_slot[4] = copy_slot<4>;
    table->copy_slot[5] = copy_slot<2>;
    table->get_slot[0] = get_slot<32>;
    table->get_slot[1] = table->get_slot[2] = get_slot<16>;
    table->get_codes[0] = get_codes<8>;
    table->get_codes[1] = get_codes<4>;
    table->get_codes[2] = get_codes<2>;
    table->put_codes[0] = put_codes<8>;
    table->put_codes[1] = put_codes<4>;
    table->put_codes[2] = put_codes<2>;
}

}  // namespace kvstrata::cpu::KV_ISA
#else
namespace kvstrata::cpu::KV_ISA {
void fill_slots(Kernels*) {}
}  // namespace kvstrata::cpu::KV_ISA
#endif
