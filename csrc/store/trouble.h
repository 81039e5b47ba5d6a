// What tests make of the Far tier's files: calls that fail, do a part, end early, bring a changed byte; copies on their way that
// come late, in another order, or not before they are let go. One relaxed load when off.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace kvstrata::store::trouble {

// Of calls, the shares that meet each; of copies on their way, the longest delay, and the share that stays.
struct Shares {
    uint64_t seed;
    float fail, part, cut, change;
    float stay;
    int32_t delay_us;
};

inline constinit std::atomic<bool> begun{false};
inline bool on() { return begun.load(std::memory_order_relaxed); }

void begin(const Shares& shares);
void end();  // what stays is let go

ssize_t pread(int file, void* to, size_t bytes, off_t place);
ssize_t pwrite(int file, const void* from, size_t bytes, off_t place);

void delay();           // by the thread that makes a copy, before it reads
size_t next(size_t n);  // of n copies that are asked for, in order, the one that is made next

}  // namespace kvstrata::store::trouble
