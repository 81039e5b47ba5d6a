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
constexpr size_t kTold = 64;              // pages that the disk hears of before the next one is read
constexpr std::chrono::seconds kLast{2};  // that threads may take to end

void block_signals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
}

}  // namespace

// left: asked of the threads of a process that this one was forked from.
enum class Stage : uint8_t { free, asked, read, there, failed, left };

struct Copier::Slot {
    FarPage page;
    void* to = nullptr;  // null: nobody wants it
    uint32_t generation = 0;
    Stage stage = Stage::free;
    std::string error;

    bool there() const { return stage >= Stage::there; }
    void make() {
        try {
            read_page(page, to);
            stage = Stage::there;
        } catch (const std::exception& failed) {
            error = failed.what();
            stage = Stage::failed;
        }
    }
};

// What the owner and its threads share.
struct Copier::Desk {
    mutable std::mutex lock;
    std::condition_variable asked, landed, ended;
    std::deque<Slot> slots;
    std::vector<int32_t> free;
    std::deque<int32_t> queue;    // slots that are asked for, in order
    size_t told = 0;              // of these the first ones, which the disk has heard of
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
        slot.to = nullptr;
        slot.error.clear();
        free.push_back(at);
    }
    int32_t next(std::deque<int32_t>::iterator turn) {
        const int32_t at = *turn;
        if (static_cast<size_t>(turn - queue.begin()) < told) --told;
        queue.erase(turn);
        return at;
    }
    bool wait(std::unique_lock<std::mutex>& held, Ticket t, std::chrono::milliseconds limit) {
        const Slot& slot = of(t);
        awaited = t.slot;
        const bool in_time = landed.wait_for(held, limit, [&] { return slot.there(); });
        awaited = -1;
        return in_time;
    }
    // A copy that is being made is its thread's to end.
    void give_up(Ticket t) {
        Slot& slot = of(t);
        slot.to = nullptr;
        if (slot.stage == Stage::read) return;
        if (slot.stage == Stage::asked) next(std::find(queue.begin(), queue.end(), t.slot));
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

// After fork() the threads are gone, and what they held stays as it is. Copies that were asked of them are made when they are
// taken.
void Copier::reopen() {
    if (process_ == ::getpid()) return;
    const std::shared_ptr<Desk> before = desk_;
    close();
    open();
    const std::lock_guard guard(desk_->lock);
    for (const Slot& slot : before->slots) {
        if (!slot.to) desk_->free.push_back(static_cast<int32_t>(desk_->slots.size()));
        desk_->slots.push_back({slot.page, slot.to, slot.generation, slot.to ? Stage::left : Stage::free, {}});
    }
}

void Copier::close() {
    if (process_ != ::getpid()) {
        new std::shared_ptr<Desk>(std::move(desk_));
        new std::vector<std::thread>(std::move(threads_));
        threads_.clear();
        return;
    }
    bool ended = false;
    {
        std::unique_lock lock(desk_->lock);
        desk_->closing = true;
        for (Slot& slot : desk_->slots) slot.to = nullptr;
        desk_->asked.notify_all();
        ended = desk_->ended.wait_for(lock, kLast, [&] { return desk_->running == 0; });
    }
    for (std::thread& thread : threads_) ended ? thread.join() : thread.detach();
    threads_.clear();
}

void Copier::ask(std::span<const Copy> copies) {
    reopen();
    const std::lock_guard guard(desk_->lock);
    for (const Copy& copy : copies) {
        if (desk_->free.empty()) {
            desk_->free.push_back(static_cast<int32_t>(desk_->slots.size()));
            desk_->slots.emplace_back();
        }
        const int32_t at = desk_->free.back();
        if (!threads_.empty()) desk_->queue.push_back(at);
        desk_->free.pop_back();
        Slot& slot = desk_->slots[at];
        slot.page = copy.page, slot.to = copy.to, slot.stage = Stage::asked;
        if (threads_.empty()) slot.make();
        *copy.ticket = {at, slot.generation};
    }
    if (desk_->idle > 0) copies.size() > 1 ? desk_->asked.notify_all() : desk_->asked.notify_one();
}

bool Copier::there(Ticket ticket) const {
    if (!ticket.stands()) return true;
    const std::lock_guard guard(desk_->lock);
    return desk_->of(ticket).there();
}

bool Copier::wait(Ticket ticket) {
    if (!ticket.stands()) return true;
    reopen();
    std::unique_lock lock(desk_->lock);
    return desk_->wait(lock, ticket, limit_);
}

bool Copier::take(Ticket ticket, bool late) {
    if (!ticket.stands()) return false;
    reopen();
    std::unique_lock lock(desk_->lock);
    Slot& slot = desk_->of(ticket);
    if (slot.stage == Stage::left) slot.make();
    const bool waits = !slot.there();
    if (waits && (late || !desk_->wait(lock, ticket, limit_))) {
        desk_->give_up(ticket);
        throw MachineError(message("far tier: pread of ", slot.page.bytes, " bytes at ", slot.page.place,
                                   " has not come back within ", limit_.count(), " ms"));
    }
    const std::string error = slot.stage == Stage::failed ? slot.error : std::string();
    desk_->leave(ticket.slot);
    if (!error.empty()) throw MachineError(error);
    return waits;
}

void Copier::give_up(Ticket ticket) {
    if (!ticket.stands()) return;
    reopen();
    const std::lock_guard guard(desk_->lock);
    desk_->give_up(ticket);
}

void Copier::move(Ticket ticket, void* to) {
    reopen();
    const std::lock_guard guard(desk_->lock);
    Slot& slot = desk_->of(ticket);
    if (slot.stage == Stage::there)
        std::copy_n(static_cast<const unsigned char*>(slot.to), slot.page.bytes, static_cast<unsigned char*>(to));
    slot.to = to;
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
        } else if (desk->queue.size() > 1) {  // the disk hears of many before the first is waited for
            size_t& told = desk->told;
            for (; told < desk->queue.size() && soon.size() < kTold; ++told)
                soon.push_back(desk->slots[desk->queue[told]].page);
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
        const auto turn = static_cast<int64_t>(trouble::next(desk->queue.size()));
        const int32_t at = desk->next(desk->queue.begin() + turn);
        Slot& slot = desk->slots[at];
        slot.stage = Stage::read;
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
        if (!slot.to) {
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
