// A rational-quadratic spline as plain data, for the reason given in kernels.h.
#pragma once

#include <cstdint>

namespace tarflow {

// What the parameters of a spline mean, named and told as in tarflow_fast/spline.py: `bins` widths, `bins` heights and
// the derivatives, of which there are bins − 1 with tails, and bins + 1 without or with `ends`; `parameters` in all.
// clang-format off
#define TARFLOW_SPLINE_FIELDS(X)                                                                          \
  X(int64_t, bins) X(double, low) X(double, high) X(double, soft_clip) X(double, min_width)               \
  X(double, min_height) X(double, min_derivative) X(double, divisor) X(bool, exponential) X(bool, tails)  \
  X(bool, ends) X(int64_t, parameters)
// clang-format on

struct SplineLaw {
#define TARFLOW_FIELD(type, name) type name;
  TARFLOW_SPLINE_FIELDS(TARFLOW_FIELD)
#undef TARFLOW_FIELD
};

// Values and their splines, fp32 or fp64 throughout. With gradients, `image` and `log_derivative` are those that flow in,
// and `at` is where the spline is taken: the value, or for the inverse its image.
struct SplineBatch {
  const void* parameters;  // (n, P)
  const void* value;       // (n,), x, or y for the inverse
  void* image;             // (n,)
  void* log_derivative;    // (n,), of the map that is applied, in nats
  const void* at;          // (n,); null without gradients
  void* d_parameters;      // (n, P); null without gradients
  void* d_value;           // (n,); null without gradients
  bool inverse;
};

}  // namespace tarflow
