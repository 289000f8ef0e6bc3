#include "threads.h"

#include <algorithm>
#include <chrono>
#ifdef _WIN32
#include <process.h>  // getpid
#else
#include <unistd.h>
#endif
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "kernels.h"

namespace tarflow {

namespace {

// The spins take some microseconds: longer than threads on cores of their own ever wait, and short where two share one.
constexpr int SPINS = 256;

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins, then yields, until ready() or until `patience` has passed. Returns whether it was ready.
template <class Ready>
bool await(const Ready& ready, std::chrono::microseconds patience) {
  for (int i = 0; i < SPINS; i++) {
    if (ready()) return true;
    pause_briefly();
  }
  const auto end = std::chrono::steady_clock::now() + patience;
  while (!ready()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

// Sleeps while the word has this value, if it has it. It may wake for no reason. Where there is no such call, it
// yields.
void sleep_while(const std::atomic<uint32_t>& word, uint32_t value) {
#ifdef __linux__
  static_assert(sizeof word == 4);
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  static_cast<void>(word), static_cast<void>(value);
  std::this_thread::yield();
#endif
}

void wake_all(const std::atomic<uint32_t>& word) {
#ifdef __linux__
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
  static_cast<void>(word);
#endif
}

// A thread spins so long at a barrier before it sleeps: at most longer than a thread that runs keeps others waiting. Where
// that was in vain it spins half as long the next time, and twice as long where it was not. Two threads of a team on one
// core, where the system may leave them beside a process that keeps the other, would spin for each other's turn for ever.
// Now and then it tries the most again: what takes longer than the least may still be worth spinning for.
constexpr std::chrono::nanoseconds MOST_PATIENCE{50'000}, LEAST_PATIENCE{1'000};
constexpr int TRIED_AGAIN = 64;  // times in vain, after which
constexpr std::chrono::microseconds LINGER{200};  // between two flow blocks a sampler needs about this long

thread_local bool running = false;  // whether this thread is inside Pool::run, or waits there for its turn

}  // namespace

Barrier::Barrier(int size) : size_(size), patience_(MOST_PATIENCE.count()) {}

void Barrier::be_patient(std::chrono::nanoseconds time) { patience_.store(time.count(), std::memory_order_relaxed); }

void Barrier::wait() {
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1);  // either this thread sees the sleeper in sleeping_, or the sleeper sees the new phase
    if (sleeping_.load() > 0) wake_all(phase_);
    return;
  }
  // To yield would hand the core to another process for a whole turn, where a thread that sleeps is woken at once.
  const std::chrono::nanoseconds patience{patience_.load(std::memory_order_relaxed)};
  const auto end = std::chrono::steady_clock::now() + patience;
  do {
    for (int i = 0; i < SPINS / 16; i++) {  // a microsecond, where a pause takes 140 cycles
      if (phase_.load(std::memory_order_acquire) != phase) {
        if (patience < MOST_PATIENCE) be_patient(std::min(2 * patience, MOST_PATIENCE));
        if (in_vain_.load(std::memory_order_relaxed) > 0) in_vain_.store(0, std::memory_order_relaxed);
        return;
      }
      pause_briefly();
    }
  } while (std::chrono::steady_clock::now() < end);
  const bool again = in_vain_.fetch_add(1, std::memory_order_relaxed) % TRIED_AGAIN == TRIED_AGAIN - 1;
  be_patient(again ? MOST_PATIENCE : std::max(patience / 2, LEAST_PATIENCE));
  sleeping_.fetch_add(1);
  while (phase_.load() == phase) sleep_while(phase_, phase);
  sleeping_.fetch_sub(1);
}

void wait_at(Barrier* barrier) { barrier->wait(); }

Pool& Pool::instance() {
  static std::mutex guard;
  static Pool* pool = nullptr;  // never destroyed: its threads end with the process
  static int owner = 0;
  const std::lock_guard<std::mutex> lock(guard);
  const int process = static_cast<int>(getpid());
  if (pool == nullptr || owner != process) {
    pool = new Pool;
    owner = process;
  }
  return *pool;
}

int Pool::at_hand(int threads) { return running ? 1 : threads; }

void Pool::run(int threads, const Job& job, const Idle& idle) {
  if (threads == 1) {
    job(0);
    return;
  }
  struct Inside {
    Inside() { running = true; }
    ~Inside() { running = false; }
  } inside;
  struct Turn {
    Pool& pool;
    bool mine;
    ~Turn() {
      if (!mine) return;
      {
        const std::lock_guard<std::mutex> lock(pool.mutex_);
        pool.taken_ = false;
      }
      pool.turn_.notify_one();
    }
  } turn{*this, false};
  std::unique_lock<std::mutex> lock(mutex_);  // is let go before the turn, whatever is thrown
  while (!turn_.wait_for(lock, std::chrono::milliseconds(20), [this] { return !taken_; })) {
    lock.unlock();
    if (!idle()) return;
    lock.lock();
  }
  turn.mine = taken_ = true;
  while (static_cast<int>(workers_.size()) < threads - 1) {
    const int rank = static_cast<int>(workers_.size()) + 1;
    workers_.emplace_back([this, rank] { work(rank); });
    workers_.back().detach();
  }
  job_ = &job;
  wanted_ = threads;
  running_.store(threads - 1, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  lock.unlock();
  wake_.notify_all();
  job(0);
  const auto finished = [&] { return running_.load(std::memory_order_acquire) == 0; };
  if (!await(finished, LINGER)) {
    lock.lock();
    while (!done_.wait_for(lock, std::chrono::milliseconds(20), finished)) {
      lock.unlock();
      idle();
      lock.lock();
    }
  }
}

void Pool::work(int rank) {
  uint64_t seen = 0;
  for (;;) {
    const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    await(called, LINGER);
    const Job* job = nullptr;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, called);
      seen = generation_.load(std::memory_order_relaxed);
      if (rank < wanted_) job = job_;
    }
    if (job == nullptr) continue;
    (*job)(rank);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_.notify_all();
    }
  }
}

}  // namespace tarflow
