// The packing of weights, from torch's layout into that of the kernels.
#pragma once

#include "engine.h"

namespace tarflow {

// Fills block's and layers' weights, in the order in which a step reads them, in one piece of memory.
Memory pack(Block& block, std::vector<Layer>& layers, const Sizes& sizes, const Source& source, int64_t panel_width,
            int64_t together, size_t& bytes);

}  // namespace tarflow
