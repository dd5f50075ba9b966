// Work that can be stopped while it goes on, as by Ctrl-C: it asks, every now and then, whether it should.
#pragma once
#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <thread>
#include <utility>

namespace cs336::text {

// Lives on the stack of the thread that calls for work, and is known to all that works for it.
class Interrupt {
 public:
  // In the other threads, once the work is to stop; Team keeps it to itself.
  struct Stopped {};

  // check() is called from this thread alone, every 50 ms while it works, and throws to stop the work.
  explicit Interrupt(std::function<void()> check)
      : check_(std::move(check)), owner_(std::this_thread::get_id()), outer_(current_) {
    current_ = this;
  }
  ~Interrupt() { current_ = outer_; }
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  // What this thread works for, or null.
  static Interrupt* current() { return current_; }
  // Makes this thread work for `interrupt` too.
  static void join(Interrupt* interrupt) { current_ = interrupt; }
  // Throws if the work is to stop.
  static void poll() {
    if (current_ != nullptr) current_->ask();
  }

 private:
  using Clock = std::chrono::steady_clock;

  void ask() {
    if (stopped_) throw Stopped();
    if (std::this_thread::get_id() != owner_) return;
    const Clock::time_point now = Clock::now();
    if (now < next_) return;
    try {
      check_();
    } catch (...) {
      stopped_ = true;
      throw;
    }
    next_ = Clock::now() + std::chrono::milliseconds(50);
  }

  static inline thread_local Interrupt* current_ = nullptr;
  std::function<void()> check_;
  std::thread::id owner_;
  Interrupt* outer_;
  Clock::time_point next_ = Clock::now() + std::chrono::milliseconds(50);
  std::atomic<bool> stopped_ = false;
};

// For a loop whose turns are short: asks once in kTurns.
template <size_t kTurns>
class PollEvery {
 public:
  void operator()() {
    if (++turns_ % kTurns == 0) [[unlikely]]
      Interrupt::poll();
  }

 private:
  size_t turns_ = 0;
};

}  // namespace cs336::text
