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

class Copier {
  public:
    explicit Copier(std::chrono::milliseconds limit);  // that one wait may last
    Copier(const Copier&) = delete;
    Copier& operator=(const Copier&) = delete;
    ~Copier();  // a thread that the disk keeps for longer is left to itself: what it works on is its own

    // The page's bytes into [to, to + bytes), which is the copy's until it is taken or given up. A process without threads has
    // them at once, and no ticket; MachineError as read_page().
    Ticket ask(const FarPage& page, void* to);
    bool there(Ticket ticket) const;  // or failed
    bool take(
        Ticket ticket);  // waits, and says whether it had to; MachineError where the copy failed or the time is up
    void give_up(Ticket ticket);
    void hint(std::span<const FarPage> pages);  // that they are asked for soon

  private:
    struct Desk;
    struct Slot;
    static void serve(const std::shared_ptr<Desk>& desk);
    void open();
    void close();

    std::chrono::milliseconds limit_;
    std::shared_ptr<Desk> desk_;
    std::vector<std::thread> threads_;
    int64_t process_ = 0;  // whose threads they are
};

}  // namespace kvstrata::store
