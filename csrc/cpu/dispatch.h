// The instruction sets that were compiled, and which of them this machine has.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace tarflow {

struct InstructionSet {
  const Kernels* kernels;
  bool usable;  // whether this machine has it
};

// Returns all instruction sets that were compiled, the slowest first.
std::vector<InstructionSet> instruction_sets();

// Returns the kernels of this name. Throws std::invalid_argument if they were not compiled or cannot be used here.
const Kernels& kernels_named(const std::string& name);

}  // namespace tarflow
