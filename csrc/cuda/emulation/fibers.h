// Fibers are functions that stop and go on, each on a stack of its own, one at a time. Which goes on is drawn at
// random.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace tarflow::emulation {

class Fibers {
 public:
  // in_order: the fiber that was woken last goes on, instead of any. stuck() returns the error text when every fiber that has not ended is paused.
  Fibers(int count, uint64_t seed, bool in_order, std::function<std::string()> stuck);
  ~Fibers();

  // Runs body(0) … body(count − 1) to their ends. The first exception ends all and is thrown; then the objects on the
  // stacks of other fibers are not destroyed.
  void run(const std::function<void(int)>& body);

  // These are called by the fiber that runs.
  int current() const { return current_; }
  void pause();  // stops until another fiber wakes it
  void yield();  // lets others go first
  void wake(int fiber) { ready_.push_back(fiber); }

 private:
  struct Context;

  void prepare(ucontext_t& start, char* stack);
  static void enter(unsigned high, unsigned low);
  void work();
  int draw();
  void switch_to(int fiber);

  const int count_;
  const bool in_order_;
  uint64_t random_;
  const std::function<std::string()> stuck_;
  const std::function<void(int)>* body_ = nullptr;
  std::unique_ptr<Context[]> contexts_;  // the context of each fiber, and last that of run()'s caller
  std::vector<int> ready_;
  int current_, ended_ = 0;
  std::exception_ptr error_;
};

}  // namespace tarflow::emulation
