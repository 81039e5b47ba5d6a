#include "store/copier.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <system_error>
#include <utility>

#include "common/check.h"
#include "store/trouble.h"

namespace kvstrata::store {
namespace {

constexpr int kThreads = 2;
constexpr std::chrono::seconds kLast{2};  // that threads may take to end

void block_signals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
}

}  // namespace

enum class Stage : uint8_t { free, asked, read, there, failed };

struct Copier::Slot {
    FarPage page;
    void* to = nullptr;
    uint32_t generation = 0;
    Stage stage = Stage::free;
    bool hinted = false;
    std::string error;
};

// What the owner and its threads share.
struct Copier::Desk {
    mutable std::mutex lock;
    std::condition_variable asked, landed, ended;
    std::deque<Slot> slots;
    std::vector<int32_t> free;
    std::deque<int32_t> queue;    // slots that are asked for, in order
    std::vector<FarPage> coming;  // hints to be passed on
    int idle = 0, running = 0;
    int32_t awaited = -1;
    bool closing = false;

    Slot& of(Ticket t) {
        Slot& slot = slots[t.slot];
        assert(slot.generation == t.generation && slot.stage != Stage::free);
        return slot;
    }
    void leave(int32_t at) {
        Slot& slot = slots[at];
        ++slot.generation;
        slot.stage = Stage::free;
        slot.error.clear();
        free.push_back(at);
    }
    // A copy that is being made is its thread's to end.
    void give_up(Ticket t) {
        Slot& slot = of(t);
        if (slot.stage == Stage::read) {
            ++slot.generation;
            return;
        }
        if (slot.stage == Stage::asked) std::erase(queue, t.slot);
        leave(t.slot);
    }
};

Copier::Copier(std::chrono::milliseconds limit) : limit_(limit) { open(); }

Copier::~Copier() { close(); }

void Copier::open() {
    desk_ = std::make_shared<Desk>();
    process_ = ::getpid();
    for (int i = 0; i < kThreads; ++i) {
        try {
            threads_.emplace_back(serve, desk_);
        } catch (const std::system_error&) {
            break;  // no more threads to be had
        }
    }
    const std::lock_guard guard(desk_->lock);
    desk_->running = static_cast<int>(threads_.size());
}

void Copier::close() {
    if (process_ != ::getpid()) {  // after fork(): the threads are gone, and what they held stays as it is
        new std::shared_ptr<Desk>(std::move(desk_));
        new std::vector<std::thread>(std::move(threads_));
        threads_.clear();
        return;
    }
    bool ended = false;
    {
        std::unique_lock lock(desk_->lock);
        desk_->closing = true;
        desk_->asked.notify_all();
        ended = desk_->ended.wait_for(lock, kLast, [&] { return desk_->running == 0; });
    }
    for (std::thread& thread : threads_) ended ? thread.join() : thread.detach();
    threads_.clear();
}

Ticket Copier::ask(const FarPage& page, void* to) {
    if (process_ != ::getpid()) {
        close();
        open();
    }
    if (threads_.empty()) {
        read_page(page, to);
        return {};
    }
    const std::lock_guard guard(desk_->lock);
    if (desk_->free.empty()) {
        desk_->free.push_back(static_cast<int32_t>(desk_->slots.size()));
        desk_->slots.emplace_back();
    }
    const int32_t at = desk_->free.back();
    desk_->queue.push_back(at);
    desk_->free.pop_back();
    Slot& slot = desk_->slots[at];
    slot.page = page, slot.to = to, slot.stage = Stage::asked, slot.hinted = false;
    if (desk_->idle > 0) desk_->asked.notify_one();
    return {at, slot.generation};
}

bool Copier::there(Ticket ticket) const {
    if (!ticket.stands()) return true;
    const std::lock_guard guard(desk_->lock);
    return desk_->of(ticket).stage >= Stage::there;
}

bool Copier::take(Ticket ticket) {
    if (!ticket.stands()) return false;
    std::unique_lock lock(desk_->lock);
    Slot& slot = desk_->of(ticket);
    const auto there = [&] { return slot.stage >= Stage::there; };
    const bool waits = !there();
    if (waits) {
        desk_->awaited = ticket.slot;
        const bool in_time = desk_->landed.wait_for(lock, limit_, there);
        desk_->awaited = -1;
        if (!in_time) {
            desk_->give_up(ticket);
            throw MachineError(message("far tier: pread of ", slot.page.bytes, " bytes at ", slot.page.place,
                                       " has not come back within ", limit_.count(), " ms"));
        }
    }
    const std::string error = slot.stage == Stage::failed ? slot.error : std::string();
    desk_->leave(ticket.slot);
    if (!error.empty()) throw MachineError(error);
    return waits;
}

void Copier::give_up(Ticket ticket) {
    if (!ticket.stands()) return;
    const std::lock_guard guard(desk_->lock);
    desk_->give_up(ticket);
}

void Copier::hint(std::span<const FarPage> pages) {
    if (pages.empty() || threads_.empty() || process_ != ::getpid()) return;
    const std::lock_guard guard(desk_->lock);
    desk_->coming.assign(pages.begin(), pages.end());  // older ones come too late
    if (desk_->idle > 0) desk_->asked.notify_one();
}

// A thread: what is asked for first, then hints.
void Copier::serve(const std::shared_ptr<Desk>& desk) {
    block_signals();
    std::vector<unsigned char> bytes;
    std::vector<FarPage> soon;
    std::unique_lock lock(desk->lock);
    while (!desk->closing) {
        soon.clear();
        if (desk->queue.empty()) {
            soon.swap(desk->coming);
        } else if (desk->queue.size() > 1) {  // the disk hears of all of them before the first is waited for
            for (int32_t at : desk->queue) {
                if (!std::exchange(desk->slots[at].hinted, true)) soon.push_back(desk->slots[at].page);
            }
        }
        if (!soon.empty()) {
            lock.unlock();
            for (const FarPage& page : soon) hint_page(page);
            lock.lock();
        } else if (desk->queue.empty()) {
            ++desk->idle;
            desk->asked.wait(lock);
            --desk->idle;
        }
        if (desk->queue.empty() || desk->closing) continue;
        const auto turn = desk->queue.begin() + static_cast<int64_t>(trouble::next(desk->queue.size()));
        const int32_t at = *turn;
        desk->queue.erase(turn);
        Slot& slot = desk->slots[at];
        slot.stage = Stage::read;
        const uint32_t generation = slot.generation;
        const FarPage page = slot.page;
        std::string error;
        lock.unlock();
        try {
            trouble::delay();
            bytes.resize(static_cast<size_t>(page.bytes));
            read_page(page, bytes.data());
        } catch (const std::exception& failed) {
            error = failed.what();
        }
        lock.lock();
        if (slot.generation != generation) {
            desk->leave(at);
            continue;
        }
        if (error.empty()) std::copy_n(bytes.data(), page.bytes, static_cast<unsigned char*>(slot.to));
        slot.stage = error.empty() ? Stage::there : Stage::failed;
        slot.error = std::move(error);
        if (desk->awaited == at) desk->landed.notify_one();
    }
    if (--desk->running == 0) desk->ended.notify_one();
}

}  // namespace kvstrata::store
