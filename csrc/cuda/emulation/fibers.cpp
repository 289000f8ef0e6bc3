// Fortification is off, because a fortified longjmp takes another stack for a corrupt one.
#undef _FORTIFY_SOURCE

#include "fibers.h"

#include <setjmp.h>
#include <sys/mman.h>

#include <stdexcept>
#include <utility>

namespace tarflow::emulation {
namespace {

constexpr size_t STACK = 128 << 10, GUARD = 64 << 10;  // bytes; the guard is whole pages on every machine
constexpr size_t GUARDED = 16 << 10;  // stacks that have a guard, which is a mapping: a process may have 65,530

// Stacks outlive a launch, so that pages that were touched once need not be made again.
class Stacks {
 public:
  char* at(size_t i) {
    while (stacks_.size() <= i) {
      constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      const bool guarded = stacks_.size() < GUARDED;
      void* memory = mmap(nullptr, GUARD + STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
      if (memory == MAP_FAILED || (guarded && mprotect(memory, GUARD, PROT_NONE)))
        throw std::runtime_error("no memory for stacks");
      stacks_.push_back(static_cast<char*>(memory) + GUARD);
    }
    return stacks_[i];
  }

 private:
  std::vector<char*> stacks_;
};

Stacks stacks;

}  // namespace

// A fiber begins by ucontext, which makes a system call at every switch, and goes on by _longjmp, which makes none.
struct Fibers::Context {
  jmp_buf jump;
  ucontext_t start;
  bool started = false;
};

Fibers::Fibers(int count, uint64_t seed, bool in_order, std::function<std::string()> stuck)
    : count_(count),
      in_order_(in_order),
      random_(seed),
      stuck_(std::move(stuck)),
      contexts_(new Context[count + 1]),
      current_(count) {
  contexts_[count].started = true;
  for (int i = 0; i < count; i++) prepare(contexts_[i].start, stacks.at(i));
}

void Fibers::prepare(ucontext_t& start, char* stack) {
  getcontext(&start);
  start.uc_stack.ss_sp = stack;
  start.uc_stack.ss_size = STACK;
  start.uc_link = nullptr;
  const uint64_t self = reinterpret_cast<uintptr_t>(this);  // in two ints: makecontext passes nothing wider
  makecontext(&start, reinterpret_cast<void (*)()>(enter), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self));
}

Fibers::~Fibers() = default;

void Fibers::run(const std::function<void(int)>& body) {
  body_ = &body;
  for (int i = 0; i < count_; i++) wake(i);
  switch_to(draw());
  if (error_) std::rethrow_exception(error_);
}

void Fibers::enter(unsigned high, unsigned low) {
  const uint64_t self = static_cast<uint64_t>(high) << 32 | low;
  reinterpret_cast<Fibers*>(static_cast<uintptr_t>(self))->work();
}

void Fibers::work() {
  int next = count_;
  try {
    (*body_)(current_);
    ended_++;
    if (ended_ < count_) next = draw();
  } catch (...) {
    error_ = std::current_exception();
  }
  switch_to(next);
}

// Throws if no fiber can go on.
int Fibers::draw() {
  if (ready_.empty()) throw std::runtime_error(stuck_());
  random_ += 0x9e3779b97f4a7c15;  // splitmix64
  uint64_t bits = (random_ ^ random_ >> 30) * 0xbf58476d1ce4e5b9;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
  if (!in_order_) std::swap(ready_[(bits >> 32) * ready_.size() >> 32], ready_.back());
  const int next = ready_.back();
  ready_.pop_back();
  return next;
}

void Fibers::pause() { switch_to(draw()); }

void Fibers::yield() {
  wake(current_);
  pause();
}

void Fibers::switch_to(int fiber) {
  if (fiber == current_) return;
  Context &from = contexts_[current_], &to = contexts_[fiber];
  if (_setjmp(from.jump)) return;
  current_ = fiber;
  if (to.started) _longjmp(to.jump, 1);
  to.started = true;
  setcontext(&to.start);
}

}  // namespace tarflow::emulation
