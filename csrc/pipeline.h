// parallel_pipeline: work whose items add to shared memory in a fixed order, so that sums have the same bits whoever
// computes them.
#pragma once
#include <sched.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace pyattn {

// Busy for a moment, then gives the core away: the thread that is waited for may need it.
template <class Condition>
void spin_until(const Condition& condition) {
  for (int i = 0; !condition(); ++i)
    if (i >= 100) sched_yield();
}

// The place of one item in the order of its unit. Every item goes through positions (of keys, say) in rising order;
// it may write at a position once all earlier items have passed it.
class Turn {
 public:
  Turn(std::atomic<int64_t>* passed, int64_t item, int64_t& oldest) : passed_(passed), item_(item), oldest_(oldest) {}

  // Returns once all earlier items have passed `position`.
  void wait(int64_t position) const {
    while (oldest_ < item_ && passed_[oldest_].load(std::memory_order_acquire) == kFinished) ++oldest_;
    for (int64_t i = oldest_; i < item_; ++i)
      spin_until([&] { return passed_[i].load(std::memory_order_acquire) >= position; });
  }
  void pass(int64_t position) const { passed_[item_].store(position, std::memory_order_release); }
  void finish() const { pass(kFinished); }

 private:
  static constexpr int64_t kFinished = INT64_MAX;

  std::atomic<int64_t>* passed_;
  int64_t item_;
  int64_t& oldest_;  // the first item that this thread does not know to be finished
};

// For each unit: begin(unit, workspace), then run(unit, item, turn, workspace) for each of its items[unit] items, then
// end(unit, workspace). A thread takes units of its own, in their order, as long as there are any, and calls their
// begin and end; then it helps with the items of others' units. start() makes a thread's workspace. Nothing else may
// throw, since others wait.
template <class Start, class Begin, class Run, class End>
void parallel_pipeline(const std::vector<int64_t>& items, int threads, const Start& start, const Begin& begin,
                       const Run& run, const End& end) {
  struct Unit {
    std::atomic<bool> open{false};
    std::atomic<int64_t> next{0}, finished{0};
    std::atomic<int64_t>* passed;
  };
  const int64_t units = static_cast<int64_t>(items.size());
  const int64_t all_items = std::accumulate(items.begin(), items.end(), int64_t{0});
  const std::unique_ptr<Unit[]> all(new Unit[items.size()]);
  const std::unique_ptr<std::atomic<int64_t>[]> passed(new std::atomic<int64_t>[static_cast<size_t>(all_items)]());
  for (int64_t u = 0, first = 0; u < units; first += items[u++]) all[u].passed = &passed[first];
  std::atomic<int64_t> next_unit{0};
  const int64_t useful = std::max(units, all_items);
  if (threads > useful) threads = static_cast<int>(useful);
  parallel_for(threads, threads, [&](int64_t) {
    auto workspace = start();
    const auto work = [&](int64_t u) {
      int64_t oldest = 0;
      for (int64_t i; (i = all[u].next.fetch_add(1, std::memory_order_relaxed)) < items[u];) {
        const Turn turn(all[u].passed, i, oldest);
        run(u, i, turn, workspace);
        turn.finish();
        all[u].finished.fetch_add(1, std::memory_order_release);
      }
    };
    for (int64_t u; (u = next_unit.fetch_add(1, std::memory_order_relaxed)) < units;) {
      begin(u, workspace);
      all[u].open.store(true, std::memory_order_release);
      work(u);
      spin_until([&] { return all[u].finished.load(std::memory_order_acquire) == items[u]; });
      end(u, workspace);
    }
    for (int64_t u = 0; u < units; ++u) {
      if (all[u].next.load(std::memory_order_relaxed) >= items[u]) continue;
      spin_until([&] { return all[u].open.load(std::memory_order_acquire); });
      work(u);
    }
  });
}

}  // namespace pyattn
