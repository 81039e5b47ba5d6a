#include "ops/quantize.h"

#include "cpu/isa.h"
#include "cpu/moves.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

constexpr int codes_index(Format f) { return static_cast<int>(f) - static_cast<int>(Format::int8); }

// Scales of a slot in a page: bf16 [groups][16] of K, then of V.
void get_scales(const unsigned char* at, int slot, int count, uint16_t* scales) {
    const uint16_t* column = reinterpret_cast<const uint16_t*>(at) + slot;
    for (int g = 0; g < count; ++g) scales[g] = column[g * kSlots];
}
void put_scales(unsigned char* at, int slot, int count, const uint16_t* scales) {
    uint16_t* column = reinterpret_cast<uint16_t*>(at) + slot;
    for (int g = 0; g < count; ++g) column[g * kSlots] = scales[g];
}

// Reads single slots as f32 vectors: a full page's as they are, a quantized page's in the rotated domain.
class Reader {
  public:
    explicit Reader(int head_dim) : dim_(head_dim) {}

    void full(const unsigned char* page, Format format, int slot, float* k, float* v) {
        kernels_.get_slot[static_cast<int>(format)](page, slot, padded_dim(dim_), raw_[0], raw_[1]);
        const DType type = static_cast<DType>(format);  // the full formats have the values of their types
        kernels_.convert(k, DType::f32, raw_[0], type, dim_);
        kernels_.convert(v, DType::f32, raw_[1], type, dim_);
    }
    void rotated(const unsigned char* page, Format format, int slot, float* k, float* v) {
        kernels_.get_codes[codes_index(format)](page, slot, dim_, raw_[0], raw_[1]);
        decode(page + k_scales_offset(format, dim_), format, slot, raw_[0], k);
        decode(page + v_scales_offset(format, dim_), format, slot, raw_[1], v);
    }

  private:
    void decode(const unsigned char* scales_at, Format format, int slot, const unsigned char* codes, float* x) {
        uint16_t scales[kMaxGroups];
        get_scales(scales_at, slot, groups(format, dim_), scales);
        kernels_.decode(codes, scales, dim_, format, group_size(format, dim_), x);
    }

    const Kernels& kernels_ = kernels();
    const int dim_;
    alignas(64) unsigned char raw_[2][kMaxHeadDim * 4];
};

// Encodes moves in order. The codes of a page gather here and are written at once: whole pages are much cheaper.
class Encoder {
  public:
    explicit Encoder(const ops::QuantizeParams& params) : p_(params), reader_(params.head_dim) {}

    void write(int first, int end) {
        for (int i = first; i < end; ++i) {
            const ops::Move& move = p_.moves[i];
            if (ops::skipped(move)) continue;
            if (move.to != page_) flush();
            page_ = move.to;
            read(i, move);
            encode(move.to_slot);
            slots_ |= static_cast<uint16_t>(1 << move.to_slot);
            move_position(p_.pools, move);
        }
        flush();
    }

  private:
    void read(int i, const ops::Move& move) {
        const Format format = p_.pools[page_pool(move.from)].format;
        const unsigned char* const page = page_at(p_.pools, move.from);
        if (!is_full(format)) return reader_.rotated(page, format, move.from_slot, x_[0], x_[1]);
        reader_.full(page, format, move.from_slot, x_[0], x_[1]);
        if (p_.centre) {
            const float* centre = p_.centre + static_cast<int64_t>(p_.row_of[i]) * p_.head_dim;
            for (int d = 0; d < p_.head_dim; ++d) x_[0][d] -= centre[d];
        }
        kernels_.rotate(x_[0], p_.head_dim, false);
        kernels_.rotate(x_[1], p_.head_dim, false);
    }

    void encode(int slot) {
        const int dim = p_.head_dim;
        const Format to = p_.pools[page_pool(page_)].format;
        unsigned char* const page = page_to(p_.pools, page_);
        unsigned char* const at[2] = {page + k_scales_offset(to, dim), page + v_scales_offset(to, dim)};
        uint16_t scales[kMaxGroups];
        for (int half = 0; half < 2; ++half) {
            kernels_.encode(x_[half], dim, to, group_size(to, dim), codes_[half][slot], scales);
            put_scales(at[half], slot, groups(to, dim), scales);
        }
    }

    void flush() {
        if (!slots_) return;
        const Format to = p_.pools[page_pool(page_)].format;
        kernels_.put_codes[codes_index(to)](page_to(p_.pools, page_), p_.head_dim, slots_, codes_[0][0], codes_[1][0],
                                            kMaxHeadDim);
        slots_ = 0;
    }

    const ops::QuantizeParams& p_;
    const Kernels& kernels_ = kernels();
    Reader reader_;
    PageId page_ = kNoPage;  // whose slots are gathered
    uint16_t slots_ = 0;
    alignas(64) float x_[2][kMaxHeadDim];
    alignas(64) unsigned char codes_[2][kSlots][kMaxHeadDim];
};

}  // namespace

void quantize(const ops::QuantizeParams& p) {
    each_part(p.moves, p.n_moves, p.threads, [&](int first, int end) { Encoder(p).write(first, end); });
}

void dequantize(const ops::DequantizeParams& p) {
    const Kernels& kernels_now = kernels();
    parallel(p.n_pages, p.threads, [&](int64_t i, int) {
        Reader reader(p.head_dim);
        const Format format = p.pools[page_pool(p.pages[i])].format;
        const unsigned char* const page = page_at(p.pools, p.pages[i]);
        for (int slot = 0; slot < kSlots; ++slot) {
            float* const k = p.k + (i * kSlots + slot) * p.head_dim;
            float* const v = p.v + (i * kSlots + slot) * p.head_dim;
            if (is_full(format)) {
                reader.full(page, format, slot, k, v);
                continue;
            }
            reader.rotated(page, format, slot, k, v);
            kernels_now.rotate(k, p.head_dim, true);
            kernels_now.rotate(v, p.head_dim, true);
            if (!p.centre) continue;
            const float* centre = p.centre + static_cast<int64_t>(p.row_of[i]) * p.head_dim;
            for (int d = 0; d < p.head_dim; ++d) k[d] += centre[d];
        }
    });
}

}  // namespace kvstrata::cpu
