#include "store/trouble.h"

#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

namespace kvstrata::store::trouble {
namespace {

struct State {
    std::mutex lock;
    std::condition_variable let_go;
    Shares shares{};
    std::mt19937_64 random;
    uint64_t times = 0;  // that it was begun or ended

    bool met(float share) { return std::uniform_real_distribution<float>(0.0f, 1.0f)(random) < share; }
};

State& state() {
    static State* const s = new State;  // never destroyed: threads may be asleep in it when the process ends
    return *s;
}

// Which fate a call meets: an error, or of how many bytes it is.
enum class Fate : uint8_t { none, fail, part, cut, change };

Fate fate() {
    State& s = state();
    const std::lock_guard guard(s.lock);
    const Shares& of = s.shares;
    if (s.met(of.fail)) return Fate::fail;
    if (s.met(of.cut)) return Fate::cut;
    if (s.met(of.part)) return Fate::part;
    return s.met(of.change) ? Fate::change : Fate::none;
}

ssize_t refused(int code) {
    errno = code;
    return -1;
}

}  // namespace

void begin(const Shares& shares) {
    State& s = state();
    const std::lock_guard guard(s.lock);
    s.shares = shares;
    s.random.seed(shares.seed);
    ++s.times;
    begun.store(true, std::memory_order_relaxed);
}

void end() {
    State& s = state();
    const std::lock_guard guard(s.lock);
    ++s.times;
    begun.store(false, std::memory_order_relaxed);
    s.let_go.notify_all();
}

ssize_t pread(int file, void* to, size_t bytes, off_t place) {
    const Fate met = on() ? fate() : Fate::none;
    if (met == Fate::fail) return refused(EIO);
    if (met == Fate::cut) return 0;
    if (met == Fate::part) bytes = (bytes + 1) / 2;
    const ssize_t n = ::pread(file, to, bytes, place);
    if (met == Fate::change && n > 0) static_cast<unsigned char*>(to)[n / 3] ^= 0x10;
    return n;
}

ssize_t pwrite(int file, const void* from, size_t bytes, off_t place) {
    const Fate met = on() ? fate() : Fate::none;
    if (met == Fate::fail || met == Fate::cut) return refused(met == Fate::fail ? EIO : ENOSPC);
    return ::pwrite(file, from, met == Fate::part ? (bytes + 1) / 2 : bytes, place);
}

void delay() {
    if (!on()) return;
    State& s = state();
    std::unique_lock lock(s.lock);
    const uint64_t times = s.times;
    if (s.met(s.shares.stay)) return s.let_go.wait(lock, [&] { return s.times != times; });
    const int32_t most = s.shares.delay_us;
    const auto us = most > 0 ? static_cast<int64_t>(s.random() % static_cast<uint64_t>(most)) : 0;
    lock.unlock();
    if (us > 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

size_t next(size_t n) {
    if (!on()) return 0;
    State& s = state();
    const std::lock_guard guard(s.lock);
    return s.random() % n;
}

}  // namespace kvstrata::store::trouble
