#include "png.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

namespace tarflow {

namespace {

// Of what is left, above and above left, the one that is nearest to left + above − corner.
int paeth(int left, int above, int corner) {
  const int from_left = std::abs(above - corner), from_above = std::abs(left - corner);
  const int from_corner = std::abs(left + above - 2 * corner);
  const int nearest = from_above <= from_corner ? above : corner;
  return from_left <= std::min(from_above, from_corner) ? left : nearest;
}

// Adds to each byte of a row what predict(left, above, corner) says. Both rows have a pixel of zeros before them.
template <int Channels, class Predict>
void add_predicted(const uint8_t* in, const uint8_t* above, uint8_t* row, int64_t bytes, Predict predict) {
  int left[Channels] = {}, corner[Channels] = {};
  for (int64_t i = 0; i < bytes; i += Channels)
    for (int c = 0; c < Channels; ++c) {
      const int up = above[i + c];
      left[c] = static_cast<uint8_t>(in[i + c] + predict(left[c], up, corner[c]));
      corner[c] = up;
      row[i + c] = static_cast<uint8_t>(left[c]);
    }
}

template <int Channels>
bool unfilter(const uint8_t* rows, int64_t height, int64_t width, bool planar, uint8_t* out) {
  const int64_t bytes = width * Channels;
  std::vector<uint8_t> both(2 * bytes);
  uint8_t *above = both.data(), *row = above + bytes;
  for (int64_t y = 0; y < height; ++y, std::swap(above, row)) {
    const uint8_t* in = rows + y * (bytes + 1) + 1;
    switch (in[-1]) {
      case 0: std::copy(in, in + bytes, row); break;
      case 1: add_predicted<Channels>(in, above, row, bytes, [](int left, int, int) { return left; }); break;
      case 2:
        for (int64_t i = 0; i < bytes; ++i) row[i] = static_cast<uint8_t>(in[i] + above[i]);
        break;
      case 3:
        add_predicted<Channels>(in, above, row, bytes, [](int left, int up, int) { return (left + up) / 2; });
        break;
      case 4: add_predicted<Channels>(in, above, row, bytes, paeth); break;
      default: return false;
    }
    if (!planar) {
      std::copy(row, row + bytes, out + y * bytes);
      continue;
    }
    for (int c = 0; c < Channels; ++c) {
      uint8_t* plane = out + (c * height + y) * width;
      for (int64_t x = 0; x < width; ++x) plane[x] = row[x * Channels + c];
    }
  }
  return true;
}

}  // namespace

bool unfilter_png(const uint8_t* rows, int64_t height, int64_t width, int64_t channels, bool planar, uint8_t* out) {
  return channels == 1 ? unfilter<1>(rows, height, width, planar, out) : unfilter<3>(rows, height, width, planar, out);
}

}  // namespace tarflow
