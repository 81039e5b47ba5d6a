// A thread's part of a workspace, cut into places that begin at whole cache lines. Without memory only its size is found.
#pragma once

#include <cstdint>

namespace kvstrata::cpu {

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

// The part of a workspace that a worker has, each of so many bytes.
inline void* part_of(void* workspace, int64_t bytes, int worker) {
    return static_cast<unsigned char*>(workspace) + worker * bytes;
}

}  // namespace kvstrata::cpu
