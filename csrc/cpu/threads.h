// The engine's own threads. No OpenMP: torch's wheel brings a libgomp of its own, and two such runtimes in one process
// keep spinning against each other.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tarflow {

// All `size` threads meet here, again and again. Waiting spins for some microseconds and then sleeps, so
// that a thread whose core another process has taken is not waited for by one that burns its own.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait();

 private:
  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<int> sleeping_{0};
};

// Worker threads that live as long as the process, woken for one job at a time.
class Pool {
 public:
  using Job = std::function<void(int rank)>;
  using Idle = std::function<bool()>;

  // The process's pool; a forked child has lost its parent's threads and gets a new one.
  static Pool& instance();

  // How many of `threads` a job of this thread may have: one alone inside another job, whose idle() or hook began it (a
  // signal's handler, a progress bar). That job has the workers, and waits for this one.
  static int at_hand(int threads);

  // threads: at hand. Runs job(0) on this thread and job(1) … job(threads − 1) on workers. Callers on several threads take turns. idle() is
  // called every few milliseconds while this thread waits; if it returns false before the job has begun, nothing is run.
  void run(int threads, const Job& job, const Idle& idle);

 private:
  void work(int rank);

  std::timed_mutex turn_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const Job* job_ = nullptr;
  int wanted_ = 0;  // ranks below take part in the current job
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> running_{0};
};

}  // namespace tarflow
