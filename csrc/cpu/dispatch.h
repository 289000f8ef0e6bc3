// Which instruction sets were compiled, and which of them this machine has.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace tarflow {

struct InstructionSet {
  const Kernels* kernels;
  bool usable;  // here
};

// All that were compiled, worst first.
std::vector<InstructionSet> instruction_sets();

// Raises std::invalid_argument if this name was not compiled or cannot be used here.
const Kernels& kernels_named(const std::string& name);

}  // namespace tarflow
