// A rational-quadratic spline with linear tails and its inverse, as told in tarflow_fast/spline.py, for samples in the
// lanes of vectors. All of it is in fp64: a steep bin magnifies the rounding of its knots, and beside the products that
// make its parameters it takes little time.
// Included by kernels.inl inside an anonymous namespace: every instruction set has its own copy.

constexpr int64_t VD = VW / 2;  // fp64 lanes of a vector

using vd = double __attribute__((vector_size(VW * 4)));
using vl = int64_t __attribute__((vector_size(VW * 4)));
using vhalf = float __attribute__((vector_size(VW * 2)));

INLINE vd load_wide(const double* p) { vd v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE vd load_wide(const float* p) {
  vhalf v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vd);
}
INLINE void store_wide(double* p, vd v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store_wide(float* p, vd v) {
  vhalf half = __builtin_convertvector(v, vhalf);
  __builtin_memcpy(p, &half, sizeof half);
}
INLINE vd wide(double x) { return x - vd{}; }
INLINE vd magnitude(vd x) { return (vd)((vl)x & (vl)(vl{} + 0x7fffffffffffffff)); }
INLINE vd at_least(vd x, double low) { return x < low ? wide(low) : x; }  // a NaN stays one
INLINE vd at_most(vd x, double high) { return x > high ? wide(high) : x; }

INLINE vd root(vd x) {
  double t[VD];
  store_wide(t, x);
  for (int64_t i = 0; i < VD; i++) t[i] = __builtin_sqrt(t[i]);
  return load_wide(t);
}

// exp(x) for x <= 709, 0 below −708. x = n ln 2 + r, |r| <= ln 2 / 2, and Taylor's polynomial of degree 13, 4e-18.
INLINE vd exp_wide(vd x) {
  const double shift = 6755399441055744.0;  // 1.5 · 2⁵²: adding it rounds to an integer, which stands in the low bits
  vd clamped = at_least(x, -708.0);
  vd n = clamped * 1.4426950408889634 + shift;
  vl exponent = (vl)n << 52;
  n -= shift;
  vd r = clamped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  const double coefficients[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                 1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1.0,
                                 1.0};
  vd p = wide(1.0 / 6227020800);
#pragma GCC unroll 13
  for (int i = 0; i < 13; i++) p = p * r + coefficients[i];
  vd y = (vd)((vl)p + exponent);
  y = x < -708.0 ? vd{} : y;
  return x != x ? x : y;
}

// log(x) for normal x > 0; −inf for 0, and inf and NaN stay. x = 2ⁿ m with m from √½ to √2, and log m = 2 artanh f for
// f = (m − 1)/(m + 1), |f| < 0.172: ten terms of its series, 4e-18.
INLINE vd log_wide(vd x) {
  vl n = ((vl)x - 0x3fe6a09e667f3bcd) >> 52;  // the bits of √½
  vd m = (vd)((vl)x - (n << 52));
  vd f = (m - 1.0) / (m + 1.0), square = f * f;
  vd p = wide(1.0 / 21);
#pragma GCC unroll 10
  for (int i = 19; i > 0; i -= 2) p = p * square + 1.0 / i;
  vd exponent = __builtin_convertvector(n, vd);
  vd y = exponent * 0.6931471805599453 + 2.0 * f * p;
  y = x == 0.0 ? wide(-__builtin_inf()) : y;
  return x < __builtin_inf() ? y : x;
}

// log(1 + x) for 0 <= x <= 1: the rounding of 1 + x is made up for.
INLINE vd log1p_wide(vd x) {
  vd u = 1.0 + x;
  vd y = log_wide(u) * (x / (u - 1.0));
  return u == 1.0 ? x : y;
}

INLINE vd soft_clip(vd p, double bound) { return bound > 0 ? p / (1.0 + magnitude(p) / bound) : p; }

// Returns the derivative that a parameter stands for. Softplus is x above 20, as in torch.
INLINE vd spline_derivative(const SplineLaw& law, vd p) {
  p = soft_clip(p, law.soft_clip);
  if (law.exponential) return law.min_derivative + exp_wide(p);
  vd softplus = at_least(p, 0.0) + log1p_wide(exp_wide(-magnitude(p)));
  return law.min_derivative + (p > 20.0 ? p : softplus);
}

// Writes exp(p − max p) of the parameters of widths or heights to `size`, a vector for each bin. Returns what a sum of
// them is multiplied by to be a share of the interval.
template <class T>
INLINE vd spline_sizes(const SplineLaw& law, const T* parameters, int64_t stride, double least, double* size) {
  const double scale = 1.0 / law.divisor;
  vd most = wide(-__builtin_inf()), sum = {};
  for (int64_t k = 0; k < law.bins; k++) {
    vd p = soft_clip(load_wide(parameters + k * stride) * scale, law.soft_clip * 0.5);
    store_wide(size + k * VD, p);
    most = p > most ? p : most;
  }
  for (int64_t k = 0; k < law.bins; k++) {
    vd e = exp_wide(load_wide(size + k * VD) - most);
    store_wide(size + k * VD, e);
    sum += e;
  }
  return (1.0 - least * (double)law.bins) / sum;
}

// Transforms VD values. Parameter p of all of them is at parameters + p · stride. `image` may be `value`, or null where
// the log-derivative alone is wanted; log_derivative may be null. scratch: 2 · bins · VD doubles.
template <class T>
INLINE void spline_lanes(const SplineLaw& law, bool inverse, const T* parameters, int64_t stride, const T* value,
                         T* image, T* log_derivative, double* scratch) {
  const int64_t bins = law.bins;
  const double tiny = 1.5e-154;  // so that a bin whose size was rounded to 0 divides nothing by it
  const double range = law.high - law.low;
  double *width = scratch, *height = scratch + bins * VD;
  const vd width_scale = spline_sizes(law, parameters, stride, law.min_width, width);
  const vd height_scale = spline_sizes(law, parameters + bins * stride, stride, law.min_height, height);
  const T* slopes = parameters + 2 * bins * stride;
  const bool inner = law.tails && !law.ends;  // the derivatives at both ends are 1

  const vd given = load_wide(value);
  const vd v = at_most(at_least(given, law.low), law.high);
  vd x_left = wide(law.low), y_left = wide(law.low), slope_left = inner ? vd{} : load_wide(slopes);
  vd x0 = x_left, y0 = y_left, x1 = x_left, y1 = y_left, d0 = slope_left, d1 = slope_left;
  vd width_sum = {}, height_sum = {}, bin = {};
  for (int64_t k = 0; k < bins; k++) {
    const bool last = k == bins - 1;
    const double before = (double)(k + 1);
    width_sum += load_wide(width + k * VD);
    height_sum += load_wide(height + k * VD);
    vd x_right = wide(law.high), y_right = wide(law.high), slope_right = {};
    if (!last) {
      x_right = law.low + range * (law.min_width * before + width_sum * width_scale);
      y_right = law.low + range * (law.min_height * before + height_sum * height_scale);
    }
    if (!inner) slope_right = load_wide(slopes + (k + 1) * stride);
    else if (!last) slope_right = load_wide(slopes + k * stride);
    vl here = k == 0 ? vl{} - 1 : (vl)((inverse ? y_left : x_left) <= v);
    x0 = here ? x_left : x0, x1 = here ? x_right : x1;
    y0 = here ? y_left : y0, y1 = here ? y_right : y1;
    d0 = here ? slope_left : d0, d1 = here ? slope_right : d1;
    bin = here ? wide((double)k) : bin;
    x_left = x_right, y_left = y_right, slope_left = slope_right;
  }
  d0 = spline_derivative(law, d0), d1 = spline_derivative(law, d1);
  if (inner) {
    d0 = bin == 0.0 ? wide(1.0) : d0;
    d1 = bin == (double)(bins - 1) ? wide(1.0) : d1;
  }
  d0 = at_least(d0, tiny), d1 = at_least(d1, tiny);

  const vd w = at_least(x1 - x0, tiny), h = at_least(y1 - y0, tiny);
  vd theta = at_most(at_least((v - (inverse ? y0 : x0)) / (inverse ? h : w), 0.0), 1.0);
  vd phi = 1.0 - theta;
  if (inverse) {
    const vd up = 2.0 * h * theta, down = 2.0 * h * phi;
    const vd q = w * (d0 * phi - d1 * theta), r = root(q * q + up * down);
    const vl falls = (vl)(q < 0.0);
    const vd a = falls ? r - q : up, b = falls ? down : q + r;
    theta = a / (a + b), phi = b / (a + b);
  }
  const vd both = theta * phi, squares = theta * theta + phi * phi;
  const vd bottom = h * squares + w * (d0 + d1) * both;
  vd out = inverse ? x0 + theta * w : y0 + h * (h * theta * theta + w * d0 * both) / bottom;
  const vd ratio = h / bottom;
  vd log = log_wide(ratio * ratio * ((w * (d1 * theta * theta + d0 * phi * phi) + 2.0 * h * both) / w));
  if (inverse) log = -log;
  const vl outside = (vl)(given < law.low) | (vl)(given > law.high);
  out = outside ? (law.tails ? given : wide(__builtin_nan(""))) : out;
  log = outside ? (law.tails ? vd{} : wide(__builtin_nan(""))) : log;
  if (image) store_wide(image, out);
  if (log_derivative) store_wide(log_derivative, log);
}

// The op by itself: parameters as torch has them, which are put into lanes here.
template <class T>
void spline_all(const SplineLaw& law, const SplineBatch& batch) {
  const int64_t P = law.parameters;
  const T* parameters = static_cast<const T*>(batch.parameters);
  double* sizes = static_cast<double*>(batch.scratch);
  T* panel = reinterpret_cast<T*>(sizes + 2 * law.bins * VD);
  for (int64_t first = 0; first < batch.n; first += VD) {
    const int64_t count = batch.n - first < VD ? batch.n - first : VD;
    T value[VD] = {}, image[VD], log_derivative[VD];
    for (int64_t i = 0; i < VD; i++) {
      const int64_t from = first + (i < count ? i : 0);
      value[i] = static_cast<const T*>(batch.value)[from];
      for (int64_t p = 0; p < P; p++) panel[p * VD + i] = parameters[from * P + p];
    }
    spline_lanes<T>(law, batch.inverse, panel, VD, value, image, log_derivative, sizes);
    __builtin_memcpy(static_cast<T*>(batch.image) + first, image, count * sizeof(T));
    __builtin_memcpy(static_cast<T*>(batch.log_derivative) + first, log_derivative, count * sizeof(T));
  }
}
