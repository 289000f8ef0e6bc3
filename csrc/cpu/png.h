// The rows of a PNG, inflated, as pixels.
#pragma once

#include <cstdint>

namespace tarflow {

// Undoes the filters of PNG (section 9 of its standard) and returns whether there were none but the five that it has.
// rows: (height, 1 + width · channels), each with its filter first. out: (channels, height, width) if planar, else
// (height, width, channels). channels: 1 or 3, of 8 bits.
bool unfilter_png(const uint8_t* rows, int64_t height, int64_t width, int64_t channels, bool planar, uint8_t* out);

}  // namespace tarflow
