#include "kernel.cuh"

namespace tarflow {

Instances float16_instances() { return instances_of<fp16>("float16"); }

}  // namespace tarflow
