// Fibers: functions with stacks of their own that give way to one another at points of their choosing.
#pragma once

#include <csetjmp>
#include <functional>
#include <memory>
#include <vector>

namespace tarflow::emulation {

// Runs some fibers on the calling thread, in an order that is drawn anew at every turn.
class Fibers {
 public:
  // Starts `count` fibers, each of which runs body(i), and returns when all have ended, or none can go on, or one has
  // called stop(). draw(n): the next random number below n. Returns whether all have ended.
  bool run(int count, const std::function<void(int)>& body, const std::function<int(int)>& draw);

  int running() const { return running_; }
  // Of the running fiber: lets others run until somebody wakes it.
  void sleep();
  // Lets others run for once.
  void yield();
  void wake(int fiber) { ready_.push_back(fiber); }
  void stop() { stopped_ = true; }

 private:
  struct Fiber;
  struct Forget {
    void operator()(Fiber* fiber) const;
  };
  static void enter();
  void switch_to(int fiber);

  std::vector<std::unique_ptr<Fiber, Forget>> fibers_;  // kept for the next run: stacks are large
  std::vector<int> ready_;
  std::jmp_buf home_;
  const std::function<void(int)>* body_ = nullptr;
  int running_ = -1, ended_ = 0;
  bool stopped_ = false;
};

}  // namespace tarflow::emulation
