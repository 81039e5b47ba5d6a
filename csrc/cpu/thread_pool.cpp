#include "cpu/thread_pool.h"

#include <pthread.h>

#include <chrono>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvstrata::cpu {
namespace {

constexpr std::chrono::microseconds kSpin{20};  // as long as a decode step's gap between two ops, then sleep

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

template <class Done>
bool spin_until(Done done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (done()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

std::atomic<ThreadPool*> current{nullptr};
std::atomic<bool> forked{false};

void in_child() {
    current.store(nullptr, std::memory_order_relaxed);  // the parent's object stays as it is: its locks may be held
    forked.store(true, std::memory_order_relaxed);
}
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, in_child);

}  // namespace

void ThreadPool::grow(int helpers) {
    while (static_cast<int>(workers_.size()) < helpers) {
        const int index = static_cast<int>(workers_.size());
        try {
            workers_.emplace_back([this, index] { work(index); });
        } catch (const std::system_error&) {
            return;  // no more threads to be had: the work is done with those there are
        }
    }
}

void ThreadPool::run(int helpers, void (*job)(void*), void* context) {
    std::unique_lock<std::mutex> owner(in_use_, std::try_to_lock);
    if (!owner.owns_lock()) return job(context);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        grow(helpers);
        wanted_ = helpers;
        job_ = job;
        context_ = context;
        epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job(context);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        wanted_ = 0;  // whoever wakes up only now has nothing left to do
    }
    while (running_.load(std::memory_order_acquire) > 0) relax();
}

void ThreadPool::work(int index) {
    for (uint64_t seen = 0;;) {
        spin_until([&] { return epoch_.load(std::memory_order_acquire) != seen; });
        void (*job)(void*) = nullptr;
        void* context = nullptr;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
            seen = epoch_.load(std::memory_order_relaxed);
            if (index >= wanted_) continue;
            running_.fetch_add(1, std::memory_order_relaxed);
            job = job_;
            context = context_;
        }
        job(context);
        running_.fetch_sub(1, std::memory_order_release);
    }
}

ThreadPool& thread_pool() {
    ThreadPool* pool = current.load(std::memory_order_acquire);
    if (pool) return *pool;
    ThreadPool* fresh = new ThreadPool;  // no threads yet
    if (current.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
    return *pool;
}

bool after_fork() { return forked.load(std::memory_order_relaxed); }

}  // namespace kvstrata::cpu
