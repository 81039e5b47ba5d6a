// A call's memory in pieces.
#pragma once

#include <cstdint>

namespace kvstrata::cuda {

// Pieces of one memory, each a multiple of 64 bytes, one after the other; without memory, their size.
struct Pieces {
    unsigned char* base;
    int64_t bytes = 0;

    template <class T>
    T* take(int64_t n) {
        T* const at = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
        bytes += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return at;
    }
};

}  // namespace kvstrata::cuda
