// Threads that live for one call: nothing to lose in a fork.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace cs336::text {

// task(i, worker) for every i < count, the next i to whichever of the workers is free. The first exception stops the
// rest and is thrown here.
template <class Task>
void parallel_for(size_t count, size_t num_threads, Task&& task) {
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&](size_t worker) {
    try {
      for (size_t i; (i = next.fetch_add(1)) < count;) task(i, worker);
    } catch (...) {
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
      next = count;
    }
  };
  std::vector<std::thread> threads;
  const size_t workers = std::max<size_t>(1, std::min(num_threads, count));
  try {
    for (size_t worker = 1; worker < workers; ++worker) threads.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // The system grants no more threads: those that there are do the work.
  }
  work(0);
  for (std::thread& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace cs336::text
