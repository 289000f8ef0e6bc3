// The step of a masked autoregressive transform, for a panel of samples that goes through all its dimensions: products
// of few units with all that is known before them, activations, and the univariate transform.
// Included by kernels.inl inside an anonymous namespace: every instruction set has its own copy.

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using type = vf;
};
template <>
struct Lanes<double> {
  using type = vd;
};
template <class T>
using Vector = typename Lanes<T>::type;

constexpr int64_t PANEL = 2;  // vectors of a panel
constexpr int64_t GROUP = ACCUMULATORS >= 24 ? 8 : 4;  // the most units of a group

template <class T>
constexpr int64_t WIDTH = sizeof(Vector<T>) / sizeof(T);
template <class T>
constexpr int64_t LANES = PANEL * WIDTH<T>;

template <class T>
INLINE Vector<T> get(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
INLINE void set(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

INLINE vd softplus_wide(vd x) {
  vd y = at_least(x, 0.0) + log1p_wide(exp_wide(-magnitude(x)));
  return x > 20.0 ? x : y;
}

INLINE vd sigmoid_wide(vd x) {
  vd e = exp_wide(-magnitude(x)), r = 1.0 / (1.0 + e);
  return x < 0.0 ? e * r : r;
}

INLINE vd tanh_wide(vd x) {
  vd e = exp_wide(-2.0 * magnitude(x)), r = (1.0 - e) / (1.0 + e);
  return x < 0.0 ? -r : r;
}

INLINE vd gelu_wide(vd x) {
  double t[VD];
  store_wide(t, x);
  for (int64_t i = 0; i < VD; i++) t[i] *= 0.5 * __builtin_erfc(t[i] * -0.70710678118654752440);
  return load_wide(t);
}

INLINE vd sin_wide(vd x) {
  double t[VD];
  store_wide(t, x);
  for (int64_t i = 0; i < VD; i++) t[i] = __builtin_sin(t[i]);
  return load_wide(t);
}

// x modulo 2 bound, in [0, 2 bound), less the bound.
INLINE vd wrap_wide(vd x, double bound) {
  double t[VD];
  store_wide(t, x);
  for (int64_t i = 0; i < VD; i++) t[i] -= 2.0 * bound * __builtin_floor(t[i] / (2.0 * bound)) + bound;
  return load_wide(t);
}

template <class T, class F>
INLINE void each_wide(T* h, const F& f) {
  for (int64_t i = 0; i < LANES<T>; i += VD) store_wide(h + i, f(load_wide(h + i)));
}

// h = act(h). No comparison hides a NaN.
template <class T>
void activate(int64_t activation, double alpha, T* h) {
  const T slope = (T)alpha;
  switch (activation) {
    case RELU:
      for (int64_t i = 0; i < LANES<T>; i += WIDTH<T>) {
        Vector<T> v = get<T>(h + i);
        set<T>(h + i, v < (T)0 ? Vector<T>{} : v);
      }
      break;
    case LEAKY_RELU:
      for (int64_t i = 0; i < LANES<T>; i += WIDTH<T>) {
        Vector<T> v = get<T>(h + i);
        set<T>(h + i, v < (T)0 ? v * slope : v);
      }
      break;
    case ELU:
      each_wide(h, [&](vd x) INLINE_LAMBDA { return x > 0.0 ? x : alpha * (exp_wide(at_most(x, 0.0)) - 1.0); });
      break;
    case TANH: each_wide(h, [](vd x) INLINE_LAMBDA { return tanh_wide(x); }); break;
    case SIGMOID: each_wide(h, [](vd x) INLINE_LAMBDA { return sigmoid_wide(x); }); break;
    case SILU: each_wide(h, [](vd x) INLINE_LAMBDA { return x * sigmoid_wide(x); }); break;
    case SOFTPLUS: each_wide(h, [](vd x) INLINE_LAMBDA { return softplus_wide(x); }); break;
    case GELU: each_wide(h, [](vd x) INLINE_LAMBDA { return gelu_wide(x); }); break;
    case SIN: each_wide(h, [](vd x) INLINE_LAMBDA { return sin_wide(x); }); break;
    case WRAP: each_wide(h, [=](vd x) INLINE_LAMBDA { return wrap_wide(x, alpha); }); break;
    default: break;
  }
}

// out[i] = b_i + Σ_k w[k][i] · in[k], for `count` units. With few of them, several sums run beside each other, so that
// the machine does not wait for each addition.
template <class T, int64_t count>
void product(const T* w, const T* bias, const T* in, int64_t inputs, T* out) {
  constexpr int64_t sums = count * PANEL >= 8 ? 1 : 8 / (count * PANEL);
  constexpr int64_t W = WIDTH<T>, N = LANES<T>;
  Vector<T> acc[sums][count][PANEL] = {};
  UNROLL for (int64_t i = 0; i < count; i++)
    UNROLL for (int64_t v = 0; v < PANEL; v++) acc[0][i][v] += bias[i];
  int64_t k = 0;
  for (; k + sums <= inputs; k += sums) {
    UNROLL for (int64_t s = 0; s < sums; s++)
      UNROLL for (int64_t v = 0; v < PANEL; v++) {
        Vector<T> a = get<T>(in + (k + s) * N + v * W);
        UNROLL for (int64_t i = 0; i < count; i++) acc[s][i][v] += w[(k + s) * count + i] * a;
      }
  }
  for (; k < inputs; k++)
    UNROLL for (int64_t v = 0; v < PANEL; v++) {
      Vector<T> a = get<T>(in + k * N + v * W);
      UNROLL for (int64_t i = 0; i < count; i++) acc[0][i][v] += w[k * count + i] * a;
    }
  UNROLL for (int64_t i = 0; i < count; i++)
    UNROLL for (int64_t v = 0; v < PANEL; v++) {
      Vector<T> sum = acc[0][i][v];
      UNROLL for (int64_t s = 1; s < sums; s++) sum += acc[s][i][v];
      set<T>(out + i * N + v * W, sum);
    }
}

// Makes a unit of a value known to all layers that read or add it.
template <class T>
INLINE void make_known(const MaskedTransform& t, T* memory, int64_t value, int64_t unit, const T* h) {
  constexpr int64_t N = LANES<T>, bytes = N * sizeof(T);
  if (t.raw_at[value] >= 0) __builtin_memcpy(memory + (t.raw_at[value] + unit) * N, h, bytes);
  for (int64_t l = 0; l < t.layers; l++) {
    const MaskedLayer& reader = t.layer[l];
    if (reader.source != value || unit >= reader.inputs) continue;
    T* to = memory + (reader.read_at + unit) * N;
    __builtin_memcpy(to, h, bytes);
    if (reader.scale)
      for (int64_t i = 0; i < N; i++) to[i] *= static_cast<const T*>(reader.scale)[unit];
    if (reader.shift)
      for (int64_t i = 0; i < N; i++) to[i] += static_cast<const T*>(reader.shift)[unit];
    activate(reader.activation, reader.alpha, to);
  }
}

// Evaluates the units of layer l that belong to the steps [first, stop). out: where the first of them goes, or null
// where they become known to other layers.
template <class T>
void evaluate(const MaskedTransform& t, const MaskedPanel& p, int64_t l, int64_t first, int64_t stop, T* out) {
  constexpr int64_t N = LANES<T>;
  const MaskedLayer& layer = t.layer[l];
  T* memory = static_cast<T*>(p.memory);
  const T* in = memory + layer.read_at * N;
  const MaskedContext terms[2] = {p.offset[l], p.gate[l]};
  alignas(64) T h[GROUP * N];
  for (int64_t g = layer.group_begin[first]; g < layer.group_begin[stop]; g++) {
    const MaskedGroup& group = layer.group[g];
    T* to = out ? out : h;
    const T *w = static_cast<const T*>(group.weight), *bias = static_cast<const T*>(layer.bias) + group.row;
    switch (group.count) {
      case 1: product<T, 1>(w, bias, in, group.inputs, to); break;
      case 2: product<T, 2>(w, bias, in, group.inputs, to); break;
      case 4: product<T, 4>(w, bias, in, group.inputs, to); break;
      default: product<T, GROUP>(w, bias, in, group.inputs, to); break;
    }
    for (int64_t i = 0; i < group.count; i++) {
      const int64_t unit = group.row + i;
      T* mine = to + i * N;
      for (int64_t which = 0; which < 2; which++) {
        const MaskedContext& c = terms[which];
        if (!c.data) continue;
        const T* from = static_cast<const T*>(c.data) + unit * c.rows;
        for (int64_t n = 0; n < N; n++) {
          const T term = c.rows == 1 ? from[0] : from[p.sample + n];
          mine[n] = which ? mine[n] * term : mine[n] + term;
        }
      }
      if (layer.add >= 0) {
        const T* more = memory + (t.raw_at[layer.add] + layer.add_at[unit]) * N;
        for (int64_t n = 0; n < N; n++) mine[n] += more[n];
      }
      if (!out) make_known(t, memory, l + 1, unit, mine);
    }
    if (out) out += group.count * N;
  }
}

// Transforms a dimension of a panel, z to x or, with `forward`, x to z. log: log|d image/d value|.
template <class T>
void transform_lanes(const MaskedTransform& t, bool forward, const T* parameters, const T* value, T* image, T* log,
                     double* scratch) {
  constexpr int64_t N = LANES<T>;
  for (int64_t i = 0; i < N; i += VD) {
    if (t.law == SPLINE) {
      spline_lanes<T>(t.spline, !forward, parameters + i, N, value + i, image + i, log + i, scratch);
      continue;
    }
    const vd v = load_wide(value + i);
    if (t.law == SHIFT) {
      const vd shift = load_wide(parameters + i);
      store_wide(image + i, forward ? v + shift : v - shift);
      store_wide(log + i, vd{});
      continue;
    }
    const vd raw = load_wide(parameters + (t.shift_first ? N : 0) + i);
    const vd shift = load_wide(parameters + (t.shift_first ? 0 : N) + i);
    vd scale, log_scale;
    if (t.law == AFFINE_SOFTCLIP || t.law == AFFINE_EXP) {
      log_scale = t.law == AFFINE_EXP ? raw : soft_clip(raw, t.floor);
      scale = exp_wide(at_most(log_scale, 709.0));
    } else {
      scale = (t.law == AFFINE_SOFTPLUS ? softplus_wide(raw) : sigmoid_wide(raw + 2.0)) + t.floor;
      log_scale = log_wide(scale);
    }
    store_wide(image + i, forward ? v * scale + shift : (v - shift) / scale);
    store_wide(log + i, forward ? log_scale : -log_scale);
  }
}

template <class T>
void masked_run(const MaskedTransform& t, const MaskedPanel& p, MaskedMode mode, int64_t first, int64_t stop) {
  constexpr int64_t N = LANES<T>;
  const T* z = static_cast<const T*>(p.z);
  T *x = static_cast<T*>(p.x), *memory = static_cast<T*>(p.memory), *parameters = static_cast<T*>(p.parameters);
  int64_t from = 0;
  while (t.begin[from + 1] <= first) from++;
  int64_t to = from;
  while (t.begin[to] < stop) to++;
  // What is final before this pass may have become so since the last one: the step before is made known again.
  for (int64_t j = t.begin[from > 0 ? from - 1 : 0]; j < (mode == SOLVE ? first : stop); j++)
    make_known(t, memory, 0, j, x + p.row[j] * N);
  if (mode != SOLVE) {
    for (int64_t l = 0; l + 1 < t.layers; l++) evaluate<T>(t, p, l, from, to, nullptr);
  }
  for (int64_t step = from; step < to; step++) {
    const int64_t begin = t.begin[step] > t.passed ? t.begin[step] : t.passed;  // the first that is transformed
    // Units that depend on no dimension are of step 0, even where all its dimensions pass unchanged.
    if (mode == SOLVE)
      for (int64_t l = 0; l + 1 < t.layers; l++) evaluate<T>(t, p, l, step, step + 1, nullptr);
    evaluate<T>(t, p, t.layers - 1, step, step + 1, parameters);
    const int64_t low = first > t.begin[step] ? first : t.begin[step];
    const int64_t high = stop < t.begin[step + 1] ? stop : t.begin[step + 1];
    for (int64_t j = low; j < high; j++) {
      const int64_t at = p.row[j] * N;
      alignas(64) T image[N], log[N] = {}, other[N], unused[N];
      const T* value = mode == FORWARD ? x + at : z + at;
      const T* mine = parameters + (j - begin) * t.parameters * N;
      if (j < t.passed) __builtin_memcpy(image, value, sizeof image);
      else transform_lanes<T>(t, mode == FORWARD, mine, value, image, log, p.scratch);
      if (mode == TOGETHER) {
        if (j < t.passed) __builtin_memcpy(other, x + at, sizeof other);
        else transform_lanes<T>(t, true, mine, x + at, other, unused, p.scratch);
        for (int64_t n = 0; n < N; n++) {
          const T change = image[n] - x[at + n], residual = other[n] - z[at + n];
          static_cast<T*>(p.change)[at + n] = change < 0 ? -change : change;
          static_cast<T*>(p.residual)[at + n] = residual < 0 ? -residual : residual;
        }
      }
      if (p.log) __builtin_memcpy(static_cast<T*>(p.log) + at, log, sizeof log);
      else
        for (int64_t n = 0; n < N; n++) p.log_det[n] += log[n];
      __builtin_memcpy(x + at, image, sizeof image);
      if (mode == SOLVE) make_known(t, memory, 0, j, image);
    }
  }
}

const MaskedKernels masked_table = {LANES<float>, LANES<double>, GROUP, 2 * VD, masked_run<float>, masked_run<double>};
