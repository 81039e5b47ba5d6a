// Our own worker threads, for processes without an OpenMP runtime.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace kvstrata::cpu {

class ThreadPool {
  public:
    // Runs job(context) once on up to `helpers` workers while the caller runs it too. Returns when all that joined have
    // returned. One job at a time: if another thread's job is running, the caller works alone.
    void run(int helpers, void (*job)(void*), void* context);

  private:
    void grow(int helpers);
    void work(int index);

    std::mutex in_use_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> epoch_{0};  // one per job
    std::atomic<int> running_{0};     // workers inside the job
    int wanted_ = 0;                  // workers below this index may join it
    void (*job_)(void*) = nullptr;
    void* context_ = nullptr;
};

// The process's pool, started at first use; a child of fork() gets a new one. It is never destroyed: workers may be
// asleep in it when the process ends.
ThreadPool& thread_pool();

// True in a child of fork(), where other runtimes' threads are gone.
bool after_fork();

}  // namespace kvstrata::cpu
