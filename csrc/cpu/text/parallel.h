// Threads that live for one call of Python's: nothing to lose in a fork.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/text/interrupt.h"

namespace cs336::text {

// Threads for many short runs: after one a thread yields for less than a millisecond, ready for the next, then sleeps.
class Team {
 public:
  explicit Team(size_t num_threads) : interrupt_(Interrupt::current()) {
    try {
      for (size_t worker = 1; worker < num_threads; ++worker) threads_.emplace_back([this, worker] { serve(worker); });
    } catch (const std::system_error&) {
      // The system grants no more threads: those that there are do the work.
    }
  }
  ~Team() {
    waiting_ = kStop;
    waiting_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // task(i, worker) for every i < count, the next i to whichever of the threads is free: one that is slow to start is
  // not waited for. The first exception stops the rest and is thrown here, and so is that of an Interrupt.
  template <class Task>
  void run(size_t count, Task&& task) {
    if (count == 0) return;
    if (count == 1) return task(0, 0);  // stays on this thread's core, with what its cache holds
    const std::function<void(size_t, size_t)> reference = std::ref(task);
    task_ = &reference;
    count_ = static_cast<int64_t>(count);
    unfinished_ = count_;
    waiting_ = count_;
    waiting_.notify_all();
    work(0);
    await(unfinished_, [](int64_t left) { return left == 0; }, [this] { finish(attempt(Interrupt::poll)); });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // Until a value is right. The thread that an Interrupt calls for looks up from a long wait to poll().
  template <class Right, class Poll>
  void await(const std::atomic<int64_t>& value, Right&& right, Poll&& poll) {
    for (int64_t now, tries = 0; !right(now = value.load());) {
      if (++tries < kTries) {
        std::this_thread::yield();
      } else if constexpr (std::is_null_pointer_v<std::decay_t<Poll>>) {
        value.wait(now);
      } else if (interrupt_ == nullptr) {
        value.wait(now);
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(200));
        poll();
      }
    }
  }

  void serve(size_t worker) {
    Interrupt::join(interrupt_);
    while (waiting_ != kStop) {
      work(worker);
      await(waiting_, [](int64_t left) { return left != 0; }, nullptr);
    }
  }

  // Keeps what is thrown, if it is the first; false then.
  template <class Action>
  bool attempt(Action&& action) {
    try {
      action();
      return true;
    } catch (const Interrupt::Stopped&) {
      return false;  // the thread that was interrupted knows why
    } catch (...) {
      const std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
      return false;
    }
  }

  // Counts `done` tasks, and those that nobody will take where one failed.
  void finish(bool is_good, int64_t done = 0) {
    if (!is_good) done += waiting_.exchange(0);
    if (done != 0 && unfinished_.fetch_sub(done) == done) unfinished_.notify_all();
  }

  // Takes tasks until none waits. While one that was taken is unfinished, the run goes on and task_ is its own.
  void work(size_t worker) {
    for (int64_t left = waiting_; left > 0;) {
      if (!waiting_.compare_exchange_weak(left, left - 1)) continue;
      const bool is_good = attempt([&] {
        (*task_)(static_cast<size_t>(count_ - left), worker);
        Interrupt::poll();
      });
      finish(is_good, 1);
      left = waiting_;
    }
  }

  static constexpr int64_t kStop = -1, kTries = 1000;
  Interrupt* const interrupt_;
  const std::function<void(size_t, size_t)>* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> waiting_ = 0, unfinished_ = 0;  // tasks that nobody has taken; that are not done
  std::exception_ptr error_;
  std::mutex error_mutex_;
  std::vector<std::thread> threads_;
};

// One run of a team of its own.
template <class Task>
void parallel_for(size_t count, size_t num_threads, Task&& task) {
  Team(std::min(num_threads, count)).run(count, task);
}

}  // namespace cs336::text
