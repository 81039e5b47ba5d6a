// Far pages on their way into Near ones while the caller computes: two threads, started by the first page that is asked for,
// ended with their owner.
//
// A thread reads into memory of its own. What it has read lands in its place only if it is what was written and is still
// wanted: a copy that was given up, however late it comes, touches nothing. A ticket stands for each copy; it names a desk's
// slot and how many copies that had before, so that it never stands for another one.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "store/far.h"

namespace kvstrata::store {

struct Ticket {
    int32_t slot = -1;  // -1: there is nothing to wait for
    uint32_t generation = 0;

    bool stands() const { return slot >= 0; }
};

// What is asked for: the page's bytes into [to, to + bytes), which is the copy's until it is taken or given up.
struct Copy {
    FarPage page;
    void* to;
    Ticket* ticket;  // out
};

class Copier {
  public:
    explicit Copier(std::chrono::milliseconds limit);  // that one wait may last
    Copier(const Copier&) = delete;
    Copier& operator=(const Copier&) = delete;
    ~Copier();  // a thread that the disk keeps for longer is left to itself: what it works on is its own

    void ask(std::span<const Copy> copies);  // in order; a process that can have no threads makes them at once
    bool there(Ticket ticket) const;         // or failed
    bool wait(Ticket ticket);                // whether it is there, or failed, in time
    // Waits, and says whether it had to; MachineError where the copy failed or the time is up. late: it is up already.
    bool take(Ticket ticket, bool late = false);
    void give_up(Ticket ticket);
    void move(Ticket ticket, void* to);         // its bytes go there instead, those that are there already too
    void hint(std::span<const FarPage> pages);  // that they are asked for soon

  private:
    struct Desk;
    struct Slot;
    static void serve(const std::shared_ptr<Desk>& desk);
    void open();
    void close();
    void reopen();

    std::chrono::milliseconds limit_;
    std::shared_ptr<Desk> desk_;
    std::vector<std::thread> threads_;
    int64_t process_ = 0;  // whose threads they are
};

}  // namespace kvstrata::store
