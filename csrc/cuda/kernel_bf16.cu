#include "kernel.cuh"

namespace tarflow {

Instances bfloat16_instances() { return instances_of<bf16>("bfloat16"); }

}  // namespace tarflow
