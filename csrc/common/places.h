// Memory of a call, cut into places that begin at multiples of 64 bytes, as the memory does. Without memory only its size is
// found.
#pragma once

#include <cstdint>

namespace kvstrata {

class Places {
  public:
    explicit Places(void* base) : base_(static_cast<unsigned char*>(base)) {}

    // count elements of T; null without memory.
    template <class T>
    T* take(int64_t count) {
        void* const place = base_ ? base_ + bytes_ : nullptr;
        bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return static_cast<T*>(place);
    }
    int64_t bytes() const { return bytes_; }  // of all that was taken

  private:
    unsigned char* const base_;
    int64_t bytes_ = 0;
};

}  // namespace kvstrata
