#include "store/swap.h"

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "common/check.h"
#include "common/fault.h"

namespace kvstrata::store {

struct Reader::Work {
    mutable std::mutex lock;
    std::condition_variable changed;
    std::deque<std::shared_ptr<Delivery>> queue;
    bool stopped = false;
    pid_t process = ::getpid();
    std::thread thread{[this] { run(); }};

    void run() {
        std::unique_lock held(lock);
        while (true) {
            changed.wait(held, [this] { return stopped || !queue.empty(); });
            if (stopped) return;
            const std::shared_ptr<Delivery> delivery = std::move(queue.front());
            queue.pop_front();
            held.unlock();
            stall();
            std::string error = read(*delivery);
            held.lock();
            delivery->error = std::move(error);
            delivery->ended = true;
            changed.notify_all();
        }
    }

    static std::string read(const Delivery& delivery) {
        for (const Fetch& f : delivery.fetches) {
            try {
                fault::hit("far.read");
                read_page(f.from, f.payload);
            } catch (const std::exception& error) {
                return of_set(error.what(), f.set);
            }
        }
        return {};
    }

    // For tests, a read that does not come back: until the fault is disarmed.
    void stall() const {
        try {
            fault::hit("far.stall");
        } catch (const MachineError&) {
            const auto goes_on = [this] {
                const std::lock_guard held(lock);
                return !stopped && fault::armed.load(std::memory_order_relaxed);
            };
            while (goes_on()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
};

std::string of_set(const char* error, pages::SetTag set) {
    return message(error, ", where a page of set ", pages::set_of(set), " was read");
}

Reader::Reader() = default;

Reader::~Reader() { stop(); }

void Reader::begin(std::shared_ptr<Delivery> delivery) {
    if (work_ && work_->process != ::getpid()) (void)work_.release();  // a child has no thread of its parent's
    if (!work_) work_ = std::make_unique<Work>();
    const std::lock_guard held(work_->lock);
    work_->queue.push_back(std::move(delivery));
    work_->changed.notify_all();
}

bool Reader::ended(const Delivery& delivery) const {
    if (!work_ || work_->process != ::getpid()) return delivery.ended;
    const std::lock_guard held(work_->lock);
    return delivery.ended;
}

bool Reader::wait(Delivery& delivery) {
    if (!work_ || work_->process != ::getpid()) {  // nobody else reads it
        if (!delivery.ended) delivery.error = Work::read(delivery);
        return delivery.ended = true;
    }
    std::unique_lock held(work_->lock);
    const auto most = std::chrono::duration<double>(patience);
    return work_->changed.wait_for(held, most, [&] { return delivery.ended; });
}

void Reader::stop() {
    if (!work_) return;
    if (work_->process != ::getpid()) {
        (void)work_.release();
        return;
    }
    {
        const std::lock_guard held(work_->lock);
        work_->stopped = true;
    }
    work_->changed.notify_all();
    work_->thread.join();
    work_.reset();
}

}  // namespace kvstrata::store
