// What the thread that asked for a pass does while it runs: it reports steps, and asks whether to go on.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>

namespace tarflow {

class Caller {
 public:
  // A hook is given the steps since its last call and returns whether to go on. It is called on the caller's own
  // thread.
  using Hook = std::function<bool(int64_t steps)>;

  explicit Caller(const Caller::Hook& hook) : hook_(hook), last_(Clock::now()) {}

  // Calls the hook if its last call was 50 ms ago. done: the steps in all, as far as this thread knows.
  void attend(int64_t done = 0) {
    constexpr auto interval = std::chrono::milliseconds(50);
    if (Clock::now() - last_ < interval) return;
    if (!stopped()) report(done);
    last_ = Clock::now();
  }

  // Calls the hook a last time, unless the pass was stopped. Returns whether the pass came to its end.
  bool finish(int64_t done = 0) {
    if (!stopped()) report(done);
    return !stopped();
  }

  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }  // any thread may ask

 private:
  using Clock = std::chrono::steady_clock;

  void report(int64_t done) {
    done = std::max(done, reported_);
    if (!hook_(done - reported_)) stopped_.store(true);
    reported_ = done;
  }

  const Caller::Hook& hook_;
  Clock::time_point last_;
  int64_t reported_ = 0;
  std::atomic<bool> stopped_{false};
};

}  // namespace tarflow
