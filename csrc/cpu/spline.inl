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

// The bin that each of VD values lies in: its corner, its size, the parameters of the derivatives at its ends, these
// derivatives, and which one it is.
struct SplineBin {
  vd x0, y0, w, h, p0, p1, d0, d1, number;
};

// Returns the bins of values, which lie in the interval. Parameter p of all of them is at parameters + p · stride.
// width, height: bins · VD doubles each, which get the exponentials of the parameters.
template <class T>
INLINE SplineBin spline_bin(const SplineLaw& law, bool inverse, const T* parameters, int64_t stride, vd v, double* width,
                            double* height) {
  const int64_t bins = law.bins;
  const double tiny = 1.5e-154;  // so that a bin whose size was rounded to 0 divides nothing by it
  const double range = law.high - law.low;
  const vd width_scale = spline_sizes(law, parameters, stride, law.min_width, width);
  const vd height_scale = spline_sizes(law, parameters + bins * stride, stride, law.min_height, height);
  const T* slopes = parameters + 2 * bins * stride;
  const bool inner = law.tails && !law.ends;  // the derivatives at both ends are 1

  vd x_left = wide(law.low), y_left = wide(law.low), slope_left = inner ? vd{} : load_wide(slopes);
  vd x0 = x_left, y0 = y_left, x1 = x_left, y1 = y_left, p0 = slope_left, p1 = slope_left;
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
    p0 = here ? slope_left : p0, p1 = here ? slope_right : p1;
    bin = here ? wide((double)k) : bin;
    x_left = x_right, y_left = y_right, slope_left = slope_right;
  }
  vd d0 = spline_derivative(law, p0), d1 = spline_derivative(law, p1);
  if (inner) {
    d0 = bin == 0.0 ? wide(1.0) : d0;
    d1 = bin == (double)(bins - 1) ? wide(1.0) : d1;
  }
  return {x0, y0, at_least(x1 - x0, tiny), at_least(y1 - y0, tiny), p0, p1, at_least(d0, tiny), at_least(d1, tiny), bin};
}

// Transforms VD values. Parameter p of all of them is at parameters + p · stride. `image` may be `value`, or null where
// the log-derivative alone is wanted; log_derivative may be null. scratch: 2 · bins · VD doubles.
template <class T>
INLINE void spline_lanes(const SplineLaw& law, bool inverse, const T* parameters, int64_t stride, const T* value,
                         T* image, T* log_derivative, double* scratch) {
  const vd given = load_wide(value);
  const vd v = at_most(at_least(given, law.low), law.high);
  const SplineBin bin = spline_bin(law, inverse, parameters, stride, v, scratch, scratch + law.bins * VD);
  const vd x0 = bin.x0, y0 = bin.y0, w = bin.w, h = bin.h, d0 = bin.d0, d1 = bin.d1;
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
  out = at_most(out, law.high);  // beyond it, where rounding alone leads, the way back has no value
  const vd ratio = h / bottom;
  vd log = log_wide(ratio * ratio * ((w * (d1 * theta * theta + d0 * phi * phi) + 2.0 * h * both) / w));
  if (inverse) log = -log;
  const vl outside = (vl)(given < law.low) | (vl)(given > law.high);
  out = outside ? (law.tails ? given : wide(__builtin_nan(""))) : out;
  log = outside ? (law.tails ? vd{} : wide(__builtin_nan(""))) : log;
  if (image) store_wide(image, out);
  if (log_derivative) store_wide(log_derivative, log);
}

// 1 / (1 + |p| / bound)², the derivative of `soft_clip`; 1 where the bound is 0.
INLINE vd soft_clip_slope(vd p, double bound) {
  if (bound <= 0) return wide(1.0);
  const vd bottom = 1.0 + magnitude(p) / bound;
  return 1.0 / (bottom * bottom);
}

// Returns the derivative of `spline_derivative` by its parameter.
INLINE vd spline_derivative_slope(const SplineLaw& law, vd p) {
  const vd clipped = soft_clip(p, law.soft_clip), slope = soft_clip_slope(p, law.soft_clip);
  if (law.exponential) return slope * exp_wide(clipped);
  const vd e = exp_wide(-magnitude(clipped));
  return slope * (clipped > 0.0 ? wide(1.0) : e) / (1.0 + e);
}

// Stores the gradient of the parameters of sizes, from those g0, g1 of the left and right end of the bin `number`. The
// left end is the sum of the sizes before the bin; the right end has its own besides, unless it is the last.
// size: what `spline_sizes` wrote.
template <class T>
INLINE void spline_size_gradient(const SplineLaw& law, const T* parameters, T* out, const double* size, vd number,
                                 vd g0, vd g1, double least) {
  g1 = number == (double)(law.bins - 1) ? vd{} : g1;
  const double factor = (law.high - law.low) * (1.0 - least * (double)law.bins), scale = 1.0 / law.divisor;
  vd sum = {}, mean = {};
  for (int64_t k = 0; k < law.bins; k++) {
    const vd e = load_wide(size + k * VD);
    sum += e;
    mean += e * (number > (double)k ? g0 + g1 : number == (double)k ? g1 : vd{});
  }
  mean /= sum;
  for (int64_t k = 0; k < law.bins; k++) {
    const vd share = (number > (double)k ? g0 + g1 : number == (double)k ? g1 : vd{}) - mean;
    const vd slope = soft_clip_slope(load_wide(parameters + k * VD) * scale, law.soft_clip * 0.5) * scale;
    store_wide(out + k * VD, slope * load_wide(size + k * VD) / sum * factor * share);
  }
}

// The gradients of VD values and their parameters, which lie P · VD together, as told in kernels/spline.py: those of the
// inverse are the forward map's at x for the gradients −λ of y and −gl of log f′.
template <class T>
INLINE void spline_gradient_lanes(const SplineLaw& law, bool inverse, const T* parameters, const T* value, const T* at,
                                  const T* d_image, const T* d_log_derivative, T* d_parameters, T* d_value,
                                  double* scratch) {
  const int64_t bins = law.bins;
  double *width = scratch, *height = scratch + bins * VD;
  const vd given = load_wide(value);
  const vl outside = (vl)(given < law.low) | (vl)(given > law.high);
  const vd x = at_most(at_least(outside ? wide(law.low) : load_wide(at), law.low), law.high);
  const SplineBin bin = spline_bin(law, false, parameters, VD, x, width, height);
  const vd w = bin.w, h = bin.h, d0 = bin.d0, d1 = bin.d1;
  const vd t = at_most(at_least((x - bin.x0) / w, 0.0), 1.0), f = 1.0 - t;
  // y = y0 + h G / E and log y′ = 2 log h + log N − log w − 2 log E; X_t, X_w, X_h … are derivatives of X
  const vd E_w = (d0 + d1) * t * f, E_h = t * t + f * f, E_d = w * t * f, E = h * E_h + w * E_w;
  const vd G = h * t * t + w * d0 * t * f, N = w * (d1 * t * t + d0 * f * f) + 2.0 * h * t * f;
  const vd E_t = (f - t) * (w * (d0 + d1) - 2.0 * h);
  const vd y_w = h * (d0 * t * f - G / E * E_w) / E, y_h = (G + h * (t * t - G / E * E_h)) / E;
  const vd y_d0 = h * (E_d - G / E * E_d) / E, y_d1 = -h * (G / E * E_d) / E;
  const vd slope = (h / E) * (h / E) * (N / w);
  const vd l_t = (2.0 * w * (d1 * t - d0 * f) + 2.0 * h * (f - t)) / N - 2.0 * E_t / E;
  const vd l_w = (d1 * t * t + d0 * f * f) / N - 2.0 * E_w / E - 1.0 / w;
  const vd l_h = 2.0 * t * f / N - 2.0 * E_h / E + 2.0 / h;
  const vd l_d0 = w * f * f / N - 2.0 * E_d / E, l_d1 = w * t * t / N - 2.0 * E_d / E;
  vd gy = load_wide(d_image), gl = load_wide(d_log_derivative);
  const vd through = outside ? (law.tails ? gy : vd{}) : vd{};
  gy = outside ? vd{} : gy, gl = outside ? vd{} : gl;  // beyond the tails y = x
  vd gv = gy * slope + gl * l_t / w;
  if (inverse) {
    gv = (gy - gl * l_t / w) / slope;
    gy = -gv, gl = -gl;
  }
  store_wide(d_value, through + gv);
  const vd g_t = gy * slope * w + gl * l_t;
  const vd g_w = gy * y_w + gl * l_w - g_t * t / w, g_h = gy * y_h + gl * l_h;
  spline_size_gradient(law, parameters, d_parameters, width, bin.number, -g_t / w - g_w, g_w, law.min_width);
  spline_size_gradient(law, parameters + bins * VD, d_parameters + bins * VD, height, bin.number, gy - g_h, g_h,
                       law.min_height);
  const vd g0 = (gy * y_d0 + gl * l_d0) * spline_derivative_slope(law, bin.p0);
  const vd g1 = (gy * y_d1 + gl * l_d1) * spline_derivative_slope(law, bin.p1);
  const vd lower = bin.number - (law.tails && !law.ends ? 1.0 : 0.0);  // which d0 comes of; d1 comes of the next
  for (int64_t j = 0; j < law.parameters - 2 * bins; j++) {
    const vd own = lower == (double)j ? g0 : vd{};
    store_wide(d_parameters + (2 * bins + j) * VD, lower + 1.0 == (double)j ? g1 : own);
  }
}

// The op by itself, or its gradient: parameters as torch has them, which are put into lanes here.
template <class T>
void spline_all(const SplineLaw& law, const SplineBatch& batch, void* scratch, int64_t begin, int64_t stop) {
  const int64_t P = law.parameters;
  const T* parameters = static_cast<const T*>(batch.parameters);
  double* sizes = static_cast<double*>(scratch);
  T* panel = reinterpret_cast<T*>(sizes + 2 * law.bins * VD);
  T* gradient = panel + P * VD;
  T *images = static_cast<T*>(batch.image), *logs = static_cast<T*>(batch.log_derivative);
  for (int64_t first = begin; first < stop; first += VD) {
    const int64_t count = stop - first < VD ? stop - first : VD;
    T value[VD] = {}, image[VD] = {}, log_derivative[VD] = {}, at[VD] = {};
    for (int64_t i = 0; i < VD; i++) {
      const int64_t from = first + (i < count ? i : 0);
      value[i] = static_cast<const T*>(batch.value)[from];
      for (int64_t p = 0; p < P; p++) panel[p * VD + i] = parameters[from * P + p];
    }
    if (!batch.d_value) {
      spline_lanes<T>(law, batch.inverse, panel, VD, value, image, log_derivative, sizes);
      __builtin_memcpy(images + first, image, count * sizeof(T));
      __builtin_memcpy(logs + first, log_derivative, count * sizeof(T));
      continue;
    }
    __builtin_memcpy(image, images + first, count * sizeof(T));
    __builtin_memcpy(log_derivative, logs + first, count * sizeof(T));
    __builtin_memcpy(at, static_cast<const T*>(batch.at) + first, count * sizeof(T));
    spline_gradient_lanes<T>(law, batch.inverse, panel, value, at, image, log_derivative, gradient, value, sizes);
    __builtin_memcpy(static_cast<T*>(batch.d_value) + first, value, count * sizeof(T));
    for (int64_t i = 0; i < count; i++)
      for (int64_t p = 0; p < P; p++) static_cast<T*>(batch.d_parameters)[(first + i) * P + p] = gradient[p * VD + i];
  }
}
