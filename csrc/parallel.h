// parallel_for: the only user of threads. Tasks are claimed one by one, so uneven ones balance.
#pragma once
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#ifdef PYATTN_STD_THREADS  // for ThreadSanitizer, which does not understand OpenMP's barriers
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace pyattn {

// A forked child inherits OpenMP's state but not its threads: a parallel region there would wait for ever.
inline std::atomic<bool> in_forked_child{false};

inline void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
}

// Calls task(i) for each i in [0, n), on up to `threads` threads. The first exception is thrown again here.
template <class Task>
void parallel_for(int64_t n, int threads, const Task& task) {
  if (threads > n) threads = static_cast<int>(n);
  if (threads <= 1 || in_forked_child) {
    for (int64_t i = 0; i < n; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) task(i);
    } catch (...) {
      next = n;
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
#ifdef PYATTN_STD_THREADS
  std::vector<std::thread> workers;
  for (int i = 1; i < threads; ++i) workers.emplace_back(work);
  work();
  for (auto& worker : workers) worker.join();
#else
#pragma omp parallel num_threads(threads)
  work();
#endif
  if (error) std::rethrow_exception(error);
}

}  // namespace pyattn
