#include "fibers.h"

#include <ucontext.h>

namespace tarflow::emulation {

namespace {
constexpr size_t STACK = size_t{128} << 10;
Fibers* entered;  // by the fiber that starts
}  // namespace

// ucontext makes the stack; turns are setjmp and longjmp, since swapcontext asks the system for its signal mask each time.
struct Fibers::Fiber {
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t context;
  std::jmp_buf place;
  bool started;
};

void Fibers::Forget::operator()(Fiber* fiber) const { delete fiber; }

bool Fibers::run(int count, const std::function<void(int)>& body, const std::function<int(int)>& draw) {
  while (static_cast<int>(fibers_.size()) < count) fibers_.emplace_back(new Fiber);
  ready_.clear();
  for (int i = 0; i < count; i++) {
    fibers_[i]->started = false;
    wake(i);
  }
  body_ = &body;
  ended_ = 0;
  stopped_ = false;
  while (!ready_.empty() && !stopped_) {
    std::swap(ready_[draw(static_cast<int>(ready_.size()))], ready_.back());
    const int next = ready_.back();
    ready_.pop_back();
    switch_to(next);
  }
  return ended_ == count;
}

void Fibers::switch_to(int fiber) {
  running_ = fiber;
  if (_setjmp(home_) != 0) return;
  Fiber& to = *fibers_[fiber];
  if (to.started) _longjmp(to.place, 1);
  to.started = true;
  entered = this;
  getcontext(&to.context);
  to.context.uc_stack.ss_sp = to.stack.get();
  to.context.uc_stack.ss_size = STACK;
  to.context.uc_link = nullptr;
  makecontext(&to.context, &Fibers::enter, 0);
  setcontext(&to.context);
}

void Fibers::enter() {
  Fibers* fibers = entered;
  (*fibers->body_)(fibers->running_);
  fibers->ended_++;
  _longjmp(fibers->home_, 1);
}

void Fibers::sleep() {
  if (_setjmp(fibers_[running_]->place) == 0) _longjmp(home_, 1);
}

void Fibers::yield() {
  wake(running_);
  sleep();
}

}  // namespace tarflow::emulation
