// Threads that live for one call of Python's: nothing to lose in a fork.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace cs336::text {

// Threads for many short runs: after one a thread yields for less than a millisecond, ready for the next, then sleeps.
class Team {
 public:
  explicit Team(size_t num_threads) {
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
  // not waited for. The first exception stops the rest and is thrown here.
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
    await(unfinished_, [](int64_t left) { return left == 0; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // Until a value is right.
  template <class Right>
  static void await(const std::atomic<int64_t>& value, Right&& right) {
    for (int64_t now, tries = 0; !right(now = value.load());) {
      if (++tries < kTries) {
        std::this_thread::yield();
      } else {
        value.wait(now);
      }
    }
  }

  void serve(size_t worker) {
    while (waiting_ != kStop) {
      work(worker);
      await(waiting_, [](int64_t left) { return left != 0; });
    }
  }

  // Takes tasks until none waits. While one that was taken is unfinished, the run goes on and task_ is its own.
  void work(size_t worker) {
    for (int64_t left = waiting_; left > 0;) {
      if (!waiting_.compare_exchange_weak(left, left - 1)) continue;
      int64_t done = 1;
      try {
        (*task_)(static_cast<size_t>(count_ - left), worker);
      } catch (...) {
        const std::lock_guard lock(error_mutex_);
        if (!error_) error_ = std::current_exception();
        done += waiting_.exchange(0);
      }
      if (unfinished_.fetch_sub(done) == done) unfinished_.notify_all();
      left = waiting_;
    }
  }

  static constexpr int64_t kStop = -1, kTries = 1000;
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
