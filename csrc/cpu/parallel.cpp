#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>

#include "cpu/openmp.h"
#include "cpu/thread_pool.h"

namespace kvstrata::cpu {
namespace {

std::atomic<bool> own_preferred{false};

struct Job {
    Body body;
    void* context;
    int64_t units;
    int threads;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
};

// What every thread of the team runs. A runtime may send fewer threads than asked for, so nothing is dealt out ahead; units
// are taken in runs, a share of what is left, so that what a thread does next is mostly the next unit, and the last ones are
// taken one by one.
void take_units(void* context) {
    Job& job = *static_cast<Job*>(context);
    const int worker = job.workers.fetch_add(1, std::memory_order_relaxed);
    if (worker >= job.threads) return;
    int64_t first = job.next.load(std::memory_order_relaxed);
    while (first < job.units) {
        const int64_t run = std::max<int64_t>(1, (job.units - first) / (4 * job.threads));
        if (!job.next.compare_exchange_weak(first, first + run, std::memory_order_relaxed)) continue;
        for (int64_t unit = first; unit < first + run; ++unit) job.body(job.context, unit, worker);
        first = job.next.load(std::memory_order_relaxed);
    }
}

bool use_openmp() { return !after_fork() && !own_preferred.load(std::memory_order_relaxed) && loaded_openmp().region; }

}  // namespace

void parallel(int64_t units, int threads, Body body, void* context) {
    if (threads > units) threads = static_cast<int>(units);
    if (threads <= 1) {
        for (int64_t unit = 0; unit < units; ++unit) body(context, unit, 0);
        return;
    }
    Job job{body, context, units, threads};
    if (use_openmp()) {
        loaded_openmp().region(take_units, &job, static_cast<unsigned>(threads), 0);
    } else {
        thread_pool().run(threads - 1, take_units, &job);
    }
}

std::string threads_source() {
    if (after_fork()) return "own pool (after fork)";
    return use_openmp() ? loaded_openmp().name : "own pool";
}

void prefer_own_pool(bool own) { own_preferred.store(own, std::memory_order_relaxed); }

}  // namespace kvstrata::cpu
