#include "ops/compact.h"

#include <cstring>

#include "cpu/isa.h"
#include "cpu/moves.h"
#include "ops/backends.h"

namespace kvstrata::cpu {
namespace {

// Sixteen moves that take one page to another slot by slot.
bool whole_page(const ops::Move* moves, int i, int end) {
    if (end - i < kSlots) return false;
    for (int slot = 0; slot < kSlots; ++slot) {
        const ops::Move& m = moves[i + slot];
        if (m.from != moves[i].from || m.to != moves[i].to || m.from_slot != slot || m.to_slot != slot) return false;
    }
    return true;
}

}  // namespace

void compact(const ops::CompactParams& p) {
    const Kernels& k = kernels();
    each_part(p.moves, p.n_moves, p.threads, [&](int first, int end) {
        for (int i = first; i < end;) {
            const ops::Move& m = p.moves[i];
            if (ops::skipped(m)) {
                ++i;
                continue;
            }
            const Format format = p.pools[page_pool(m.to)].format;
            unsigned char* const to = page_to(p.pools, m.to);
            const unsigned char* const from = page_at(p.pools, m.from);
            const bool whole = whole_page(p.moves, i, end);
            if (whole) {
                std::memcpy(to, from, static_cast<size_t>(page_bytes(format, p.head_dim)));
            } else {
                k.copy_slot[static_cast<int>(format)](to, m.to_slot, from, m.from_slot, padded_dim(p.head_dim),
                                                      2 * groups(format, p.head_dim));
            }
            for (const int last = i + (whole ? kSlots : 1); i < last; ++i) move_position(p.pools, p.moves[i]);
        }
    });
}

}  // namespace kvstrata::cpu
