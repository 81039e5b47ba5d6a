// Fibers, the schedule of a block, and what ends the process. See emulate.h.
#include "cuda/emulate/emulate.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <vector>

#include "cuda/emulate/fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The linker's bounds of all static shared memory of this library.
extern "C" {
__attribute__((weak, visibility("hidden"))) extern unsigned char __start_kvstrata_shared[];
__attribute__((weak, visibility("hidden"))) extern unsigned char __stop_kvstrata_shared[];
}

namespace kvstrata::cuda::emulate {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 232448;  // bytes of dynamic shared memory, sm_90
constexpr size_t kGuard = 1024;        // bytes after it that no kernel may write
constexpr unsigned char kGuardByte = 0xA5;
constexpr uint64_t kPoisonedBlocks = 4;  // of a launch: static shared memory is of all kernels, so not for every block

enum class State : uint8_t { ready, at_warp, at_block, returned };

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Thread {
    Fiber fiber;
    uint3 index;
    State state;
    const char* at;  // the collective where it waits
    unsigned mask;
    Place place;
    void* slot;
    std::vector<Copy> copies;    // not yet done
    std::vector<size_t> groups;  // ends of committed groups in `copies`
};

struct Grid {
    const char* op;
    void (*body)(void*);
    void* context;
    int threads;
};

std::mutex one_launch;
Grid grid;
std::vector<Thread> threads;
Thread* running = nullptr;
Fiber scheduler;
int alive = 0, at_barrier = 0;
uint64_t seed = 0;
alignas(128) unsigned char shared_memory[kMaxShared + kGuard];

uint64_t next_random(uint64_t& state) {  // splitmix64
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
int index_of(const Thread& t) { return static_cast<int>(&t - threads.data()); }
int lanes_of(int first) { return grid.threads - first < warpSize ? grid.threads - first : warpSize; }

void print_place() {
    std::fprintf(stderr,
                 "kvstrata emulation: launch of %s, grid (%u, %u, %u), block (%u, %u, %u) of (%u, %u, %u) threads",
                 grid.op, gridDim.x, gridDim.y, gridDim.z, blockIdx.x, blockIdx.y, blockIdx.z, blockDim.x, blockDim.y,
                 blockDim.z);
}

// All threads wait, and nobody can come any more.
[[noreturn]] void stuck() {
    print_place();
    std::fprintf(stderr, ": no thread can go on\n");
    for (int i = 0, end; i < grid.threads; i = end) {
        const Thread& t = threads[i];
        const auto alike = [&](const Thread& o) {
            if (o.state != t.state) return false;
            return t.state == State::returned || (o.at == t.at && o.mask == t.mask && o.place.line() == t.place.line());
        };
        for (end = i + 1; end < grid.threads && alike(threads[end]); ++end) {
        }
        std::fprintf(stderr, "  threads %d..%d ", i, end - 1);
        if (t.state == State::returned) {
            std::fprintf(stderr, "have returned\n");
        } else {
            std::fprintf(stderr, "wait at %s, mask %08x, %s:%u\n", t.at, t.mask, t.place.file_name(), t.place.line());
        }
    }
    std::abort();
}

void to_scheduler() { switch_fiber(running->fiber, scheduler); }

void wait_at(State state, const char* name, unsigned mask, void* slot, Place place) {
    running->state = state;
    running->at = name;
    running->mask = mask;
    running->slot = slot;
    running->place = place;
}

void check_same_place(const Thread& a, const Thread& b) {
    if (same(a.at, b.at) && a.place.line() == b.place.line() && a.place.column() == b.place.column()) return;
    char why[512];
    std::snprintf(why, sizeof why, "thread %d is at %s:%u, thread %d at %s, %s:%u", index_of(a), a.place.file_name(),
                  a.place.line(), index_of(b), b.at, b.place.file_name(), b.place.line());
    fault(a.at, why);
}

using Finish = void (*)(void* const*, int);
Finish block_finish = nullptr;

// Lets the block go on if every thread that has not returned is at the barrier.
bool open_barrier() {
    if (alive == 0 || at_barrier != alive) return false;
    void* slots[kMaxThreads];
    int n = 0;
    const Thread* first = nullptr;
    for (Thread& t : threads) {
        if (t.state != State::at_block) continue;
        if (first == nullptr) first = &t;
        check_same_place(*first, t);
        slots[n++] = t.slot;
    }
    block_finish(slots, n);
    for (Thread& t : threads)
        if (t.state == State::at_block) t.state = State::ready;
    at_barrier = 0;
    return true;
}

void thread_main() {
    begin_fiber(scheduler);
    for (;;) {  // a fiber is used again for the same thread of the next block
        grid.body(grid.context);
        running->state = State::returned;
        --alive;
        open_barrier();
        to_scheduler();
    }
}

void shuffle_order(std::vector<int>& order, uint64_t& state) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random(state) % i]);
}

void run_block(size_t shared_bytes, bool poison_static, uint64_t& state) {
    std::memset(shared_memory, 0xFF, shared_bytes);
    std::memset(shared_memory + shared_bytes, kGuardByte, kGuard);
    if (poison_static && __start_kvstrata_shared != nullptr)
        std::memset(__start_kvstrata_shared, 0xFF,
                    static_cast<size_t>(__stop_kvstrata_shared - __start_kvstrata_shared));
    for (Thread& t : threads) {
        t.state = State::ready;
        t.copies.clear();
        t.groups.clear();
    }
    alive = grid.threads;
    at_barrier = 0;
    std::vector<int> order(threads.size());
    std::iota(order.begin(), order.end(), 0);
    while (alive > 0) {
        bool moved = false;
        if (seed != 0) shuffle_order(order, state);
        for (const int i : order) {
            if (threads[i].state != State::ready) continue;
            moved = true;
            running = &threads[i];
            threadIdx = running->index;
            switch_fiber(scheduler, running->fiber);
        }
        if (!moved) stuck();
    }
    running = nullptr;
    for (size_t i = 0; i < kGuard; ++i) {
        if (shared_memory[shared_bytes + i] == kGuardByte) continue;
        print_place();
        std::fprintf(stderr, ": wrote byte %zu of %zu bytes of dynamic shared memory\n", shared_bytes + i,
                     shared_bytes);
        std::abort();
    }
}

void make_threads(dim3 block) {
    threads.resize(static_cast<size_t>(grid.threads));
    for (int i = 0; i < grid.threads; ++i) {
        const unsigned u = static_cast<unsigned>(i);
        threads[i].index = {u % block.x, u / block.x % block.y, u / block.x / block.y};
        start_fiber(threads[i].fiber, i, thread_main);
    }
}

}  // namespace

void fault(const char* what, const char* why) {
    print_place();
    std::fprintf(stderr, ", thread (%u, %u, %u): %s: %s\n", threadIdx.x, threadIdx.y, threadIdx.z, what, why);
    std::abort();
}

int lane() { return index_of(*running) % warpSize; }
unsigned char* dynamic_shared() { return shared_memory; }

void warp_collective(const char* name, unsigned mask, void* slot, void (*finish)(void* const*, unsigned), Place place) {
    const int first = index_of(*running) / warpSize * warpSize, lanes = lanes_of(first);
    if (lanes < warpSize) mask &= (1u << lanes) - 1u;  // lanes that the block does not have
    if (!(mask >> lane() & 1u)) fault(name, "the thread is not in its mask");
    wait_at(State::at_warp, name, mask, slot, place);
    for (int i = lanes - 1; i >= 0; --i) {  // the last lane comes last if they run in order
        if (!(mask >> i & 1u)) continue;
        const Thread& t = threads[first + i];
        if (t.state == State::returned) {
            char why[64];
            std::snprintf(why, sizeof why, "its mask names thread %d, which has returned", first + i);
            fault(name, why);
        }
        if (t.state != State::at_warp || t.mask != mask || !same(t.at, name)) return to_scheduler();
    }
    void* slots[warpSize] = {};
    for (int i = 0; i < lanes; ++i) {
        if (!(mask >> i & 1u)) continue;
        check_same_place(*running, threads[first + i]);
        slots[i] = threads[first + i].slot;
    }
    finish(slots, mask);
    for (int i = 0; i < lanes; ++i)
        if (mask >> i & 1u) threads[first + i].state = State::ready;
}

void block_collective(const char* name, void* slot, void (*finish)(void* const*, int), Place place) {
    wait_at(State::at_block, name, 0xFFFFFFFFu, slot, place);
    ++at_barrier;
    block_finish = finish;
    if (!open_barrier()) to_scheduler();
}

void copy_async(void* shared, const void* global, int n) {
    const auto* to = static_cast<unsigned char*>(shared);
    const auto inside = [&](const unsigned char* begin, const unsigned char* end) {
        return to >= begin && to + n <= end;
    };
    if (!inside(shared_memory, shared_memory + kMaxShared) && !inside(__start_kvstrata_shared, __stop_kvstrata_shared))
        fault("copy_async16", "the target is not in shared memory");
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % static_cast<unsigned>(n) != 0)
        fault("copy_async16", "an address is not a multiple of 16");
    std::memset(shared, 0xFF, static_cast<size_t>(n));
    running->copies.push_back({shared, global, n});
}

void copy_async_commit() { running->groups.push_back(running->copies.size()); }

void copy_async_wait(int pending) {
    auto& groups = running->groups;
    auto& copies = running->copies;
    if (groups.size() <= static_cast<size_t>(pending)) return;
    const size_t done = groups.size() - static_cast<size_t>(pending), end = groups[done - 1];
    for (size_t i = 0; i < end; ++i) std::memcpy(copies[i].to, copies[i].from, static_cast<size_t>(copies[i].bytes));
    copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(end));
    groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(done));
    for (size_t& group : groups) group -= end;
}

cudaError_t run(const char* op, dim3 grid_dim, dim3 block, size_t shared_bytes, void (*body)(void*), void* context) {
    const uint64_t n_threads = uint64_t{block.x} * block.y * block.z;
    const uint64_t n_blocks = uint64_t{grid_dim.x} * grid_dim.y * grid_dim.z;
    if (n_threads == 0 || n_threads > kMaxThreads || block.z > 64) return cudaErrorInvalidConfiguration;
    if (n_blocks == 0 || grid_dim.x > 0x7FFFFFFFu || grid_dim.y > 65535u || grid_dim.z > 65535u)
        return cudaErrorInvalidConfiguration;
    if (shared_bytes > kMaxShared) return cudaErrorInvalidValue;
    const std::lock_guard lock(one_launch);
    grid = {op, body, context, static_cast<int>(n_threads)};
    gridDim = grid_dim;
    blockDim = block;
    make_threads(block);
    uint64_t state = seed;
    const uint64_t turn = seed != 0 ? next_random(state) % n_blocks : 0;
    for (uint64_t i = 0; i < n_blocks; ++i) {
        uint64_t b = seed != 0 ? n_blocks - 1 - (i + turn) % n_blocks : i;
        blockIdx.x = static_cast<unsigned>(b % grid_dim.x);
        b /= grid_dim.x;
        blockIdx.y = static_cast<unsigned>(b % grid_dim.y);
        blockIdx.z = static_cast<unsigned>(b / grid_dim.y);
        run_block(shared_bytes, i < kPoisonedBlocks, state);
    }
    return cudaSuccess;
}

}  // namespace kvstrata::cuda::emulate

// 0: threads and blocks run in order; else in an order drawn from the seed. Holds for later launches of the process.
extern "C" __attribute__((visibility("default"))) void kvstrata_cuda_emulate_seed(uint64_t seed) {
    const std::lock_guard lock(kvstrata::cuda::emulate::one_launch);
    kvstrata::cuda::emulate::seed = seed;
}
