// The update of an affine coupling and its gradient, as told in tarflow_fast/fused/affine_coupling.py: one pass over
// memory each, in the dtype of the data.
// Included by kernels.inl inside an anonymous namespace: every instruction set has its own copy.

INLINE vf any_exp(vf x) { return exp_negative(x); }  // which takes up to 88 as well
INLINE vd any_exp(vd x) { return exp_wide(x); }

// tanh x = (1 − e)/(1 + e), e = exp(−2|x|), with the sign of x.
INLINE vf any_tanh(vf x) {
  const vf e = exp_negative(bits((vu)x & 0x7fffffffu) * -2.0f), t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}
INLINE vd any_tanh(vd x) { return tanh_wide(x); }

// What a vector holds: `count` values, from the place `first` on, of each of `samples` samples that follow one another.
// There are several where a sample has fewer values than a vector has lanes.
struct Some {
  int64_t first, count, samples;
};

// Returns them of rows that are `stride` apart, and 0 in the lanes that are left.
template <class T>
INLINE Vector<T> get_some(const T* p, int64_t stride, Some some) {
  if (some.count == WIDTH<T>) return get<T>(p + some.first);
  T t[WIDTH<T>] = {};
  for (int64_t b = 0; b < some.samples; b++)
    for (int64_t i = 0; i < some.count; i++) t[b * some.count + i] = p[b * stride + some.first + i];
  return get<T>(t);
}

template <class T>
INLINE void set_some(T* p, int64_t stride, Some some, Vector<T> v) {
  if (some.count == WIDTH<T>) return set<T>(p + some.first, v);
  T t[WIDTH<T>];
  set<T>(t, v);
  for (int64_t b = 0; b < some.samples; b++)
    for (int64_t i = 0; i < some.count; i++) p[b * stride + some.first + i] = t[b * some.count + i];
}

// Calls work(b, samples) for groups of samples [b, b + samples) that share a vector, or for each alone.
template <class T, class F>
INLINE void in_groups(int64_t values, int64_t first, int64_t stop, const F& work) {
  const int64_t most = values < WIDTH<T> ? WIDTH<T> / values : 1;
  for (int64_t b = first; b < stop; b += most) work(b, stop - b < most ? stop - b : most);
}

template <class T, bool SCALED, bool INVERSE>
void couple_samples(const CouplingBatch& batch, int64_t first, int64_t stop) {
  using V = Vector<T>;
  const int64_t N = batch.values, W = WIDTH<T>, outputs = SCALED ? 2 : 1;
  const T bound = (T)batch.bound, sign = INVERSE ? (T)1 : (T)-1;
  const T* changes = static_cast<const T*>(batch.changes);
  in_groups<T>(N, first, stop, [&](int64_t b, int64_t samples) INLINE_LAMBDA {
    const T* shift = static_cast<const T*>(batch.parameters) + b * N * outputs;
    const T* in = static_cast<const T*>(batch.in) + b * N;
    T *out = static_cast<T*>(batch.out) + b * N, *log_det = static_cast<T*>(batch.log_det) + b;
    V total = {};
    for (int64_t i = 0; i < N; i += W) {
      const Some some{i, N - i < W ? N - i : W, samples};
      const V given = get_some<T>(in, N, some), t = get_some<T>(shift, N * outputs, some);
      const auto passes = get_some<T>(changes, 0, some) == (T)0;
      V made = INVERSE ? given + t : given - t;
      if (SCALED) {
        V s = any_tanh(get_some<T>(shift + N, N * outputs, some) / bound) * bound;
        const V scale = any_exp(s * sign);
        made = INVERSE ? given * scale + t : (given - t) * scale;
        s = passes ? V{} : s;
        total += s;
      }
      set_some<T>(out, N, some, passes ? given : made);
    }
    T each[WIDTH<T>];
    set<T>(each, total * sign);
    const int64_t lanes = N < W ? N : W;  // of a sample
    for (int64_t k = 0; k < samples; k++) {
      T sum = 0;
      for (int64_t i = 0; i < lanes; i++) sum += each[k * lanes + i];
      log_det[k] = SCALED ? sum : 0;
    }
  });
}

template <class T, bool SCALED, bool INVERSE>
void couple_gradients(const CouplingBatch& batch, int64_t first, int64_t stop) {
  using V = Vector<T>;
  const int64_t N = batch.values, W = WIDTH<T>, outputs = SCALED ? 2 : 1;
  const T bound = (T)batch.bound, sign = INVERSE ? (T)1 : (T)-1;
  const T* changes = static_cast<const T*>(batch.changes);
  in_groups<T>(N, first, stop, [&](int64_t b, int64_t samples) INLINE_LAMBDA {
    const T* raw = static_cast<const T*>(batch.parameters) + b * N * outputs + N;
    const T* z = static_cast<const T*>(batch.latents) + b * N;
    const T* d_out = static_cast<const T*>(batch.out) + b * N;
    const T* d_log_det = static_cast<const T*>(batch.log_det) + b;
    T* d_shift = static_cast<T*>(batch.d_parameters) + b * N * outputs;
    T* d_in = static_cast<T*>(batch.d_in) + b * N;
    T each[WIDTH<T>] = {};
    for (int64_t i = 0; SCALED && i < (N < W ? samples * N : W); i++) each[i] = d_log_det[N < W ? i / N : 0];
    const V d_log = get<T>(each);
    for (int64_t i = 0; i < N; i += W) {
      const Some some{i, N - i < W ? N - i : W, samples};
      const V d = get_some<T>(d_out, N, some);
      const auto passes = get_some<T>(changes, 0, some) == (T)0;
      V through = d;
      if (SCALED) {
        const V t = any_tanh(get_some<T>(raw, N * outputs, some) / bound);
        through = d * any_exp(t * bound * sign);
        // ds = dx z exp(s) + dlog of the inverse, and −dz z − dlog
        const V d_s = ((INVERSE ? through : d) * get_some<T>(z, N, some) + d_log) * sign;
        set_some<T>(d_shift + N, N * outputs, some, passes ? V{} : d_s * ((T)1 - t * t));
      }
      set_some<T>(d_shift, N * outputs, some, passes ? V{} : (INVERSE ? d : -through));
      set_some<T>(d_in, N, some, passes ? d : through);
    }
  });
}

template <class T>
void couple(const CouplingBatch& batch, int64_t first, int64_t stop) {
  const bool back = batch.d_in != nullptr;
#define TARFLOW_COUPLE(S, I) (back ? couple_gradients<T, S, I> : couple_samples<T, S, I>)(batch, first, stop)
  if (batch.scaled) batch.inverse ? TARFLOW_COUPLE(true, true) : TARFLOW_COUPLE(true, false);
  else batch.inverse ? TARFLOW_COUPLE(false, true) : TARFLOW_COUPLE(false, false);
#undef TARFLOW_COUPLE
}
