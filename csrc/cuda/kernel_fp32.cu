#include "kernel.cuh"

namespace tarflow {

Instances float32_instances() { return instances_of<float>("float32"); }

}  // namespace tarflow
