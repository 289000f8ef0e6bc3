// The engine's own threads. There is no OpenMP, because torch's wheel brings a libgomp of its own, and two such
// runtimes in one process keep spinning against each other.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tarflow {

// All `size` threads meet at a barrier, again and again. A thread that waits spins for some microseconds and then
// sleeps, so that it does not burn its core while another process has taken the core of the thread that it waits for.
class Barrier {
 public:
  explicit Barrier(int size);
  void wait();

 private:
  void be_patient(std::chrono::nanoseconds time);

  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int64_t> patience_;  // nanoseconds, of whoever waits next; any that was stored will do
  std::atomic<int> in_vain_{0};    // times that spinning was in vain since it was not
};

// Worker threads that live as long as the process, woken for one job at a time.
class Pool {
 public:
  using Job = std::function<void(int rank)>;
  using Idle = std::function<bool()>;

  // Returns the process's pool. A forked child has lost its parent's threads and gets a new one.
  static Pool& instance();

  // Returns how many of `threads` a job of this thread may have. Inside another job, whose idle() or hook began it (a
  // signal's handler, a progress bar), that is one: the other job has the workers, and waits for this one.
  static int at_hand(int threads);

  // Runs job(0) on this thread and job(1) … job(threads − 1) on workers. threads: as many as at_hand() gives. Callers
  // on several threads take turns. idle() is called every few milliseconds while this thread waits. If it returns false
  // before the job has begun, nothing is run.
  void run(int threads, const Job& job, const Idle& idle);

 private:
  void work(int rank);

  std::mutex mutex_;
  std::condition_variable turn_, wake_, done_;
  bool taken_ = false;  // whether a job has the workers
  std::vector<std::thread> workers_;
  const Job* job_ = nullptr;
  int wanted_ = 0;  // ranks below this one take part in the current job
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> running_{0};
};

}  // namespace tarflow
