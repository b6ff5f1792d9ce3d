// Fragment of mlp.cpp, compiled once per instruction set: the kernels for rows [begin, end) of the
// arguments. It assumes vec.inl.

// Activations: `value` returns act(x), and sets `derivative` to act'(x). act(NaN) is NaN.
template <class C>
struct Relu {
  static Vec<C> value(Vec<C> x, Vec<C>& derivative) {
    derivative = x <= 0 ? Vec<C>{} : broadcast(C{1});
    return x <= 0 ? Vec<C>{} : x;
  }
};

template <class C>
struct Gelu {
  static Vec<C> value(Vec<C> x, Vec<C>& derivative) {
    Vec<C> density;
    const Vec<C> cdf = normal_cdf(x, density);
    derivative = cdf + x * density;
    return x * cdf;
  }
};

// x (1 + tanh(u)) / 2 = x sigma(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
template <class C>
struct GeluTanh {
  static Vec<C> value(Vec<C> x, Vec<C>& derivative) {
    constexpr C c = C(1.5957691216057308);  // sqrt(8 / pi)
    // Beyond 30, sigma is 0 or 1, and the square could overflow.
    const Vec<C> near = vmin(broadcast(C{30}), vmax(broadcast(C{-30}), x));
    const Vec<C> square = near * near;
    const Vec<C> sigma = sigmoid<C>(near * (c + c * C(0.044715) * square), derivative);
    derivative = sigma + x * (derivative * (c + 3 * c * C(0.044715) * square));
    return x * sigma;
  }
};

template <class C>
struct Silu {
  static Vec<C> value(Vec<C> x, Vec<C>& derivative) {
    const Vec<C> sigma = sigmoid<C>(x, derivative);
    derivative = sigma + x * derivative;
    return x * sigma;
  }
};

template <class C>
struct QuickGelu {
  static Vec<C> value(Vec<C> x, Vec<C>& derivative) {
    constexpr C c = C(1.702);
    const Vec<C> sigma = sigmoid<C>(c * x, derivative);
    derivative = sigma + x * (derivative * c);
    return x * sigma;
  }
};

// p += v, for the first n elements.
template <class C>
inline void accumulate(C* p, Vec<C> v, int64_t n) {
  store_left(p, load_left(p, n) + v, n);
}

// Row m of a matrix of F columns, null if it is absent.
template <class T>
inline T* row(void* first, int64_t m, int64_t F) {
  return first ? static_cast<T*>(first) + m * F : nullptr;
}
template <class T>
inline const T* row(const void* first, int64_t m, int64_t F) {
  return first ? static_cast<const T*>(first) + m * F : nullptr;
}

// Computes h, and rounds total and up to pre and rounded_up if they are wider. T is the type of
// pre, P that of all that enters or leaves products.
template <class T, class P, class Act>
void forward_rows(const MlpForward& a, int64_t begin, int64_t end) {
  using V = Vec<Compute<T>>;
  const int64_t F = a.F;
  for (int64_t m = begin; m < end; ++m) {
    const P *total = row<P>(a.total, m, F), *up = row<P>(a.up, m, F);
    T *pre = row<T>(a.pre, m, F), *rounded_up = row<T>(a.rounded_up, m, F);
    P* h = row<P>(a.h, m, F);
    for (int64_t n = 0; n < F; n += kLanes<Compute<T>>) {
      const int64_t left = F - n;
      const V x = load_left(total + n, left);
      V derivative, value = Act::value(x, derivative);
      if (pre) store_left(pre + n, x, left);
      if (up) {
        const V factor = load_left(up + n, left);
        if (rounded_up) store_left(rounded_up + n, factor, left);
        value = value * factor;
      }
      store_left(h + n, value, left);
    }
  }
}

// Computes dpre, dup and h. Unless db is null, adds the sums of dpre over the rows to its first F
// elements, and the sums of dup to the next F.
template <class T, class P, class Act>
void backward_rows(const MlpBackward& a, int64_t begin, int64_t end, Compute<T>* db) {
  using V = Vec<Compute<T>>;
  const int64_t F = a.F;
  for (int64_t m = begin; m < end; ++m) {
    const P* dh = row<P>(a.dh, m, F);
    const T *pre = row<T>(a.pre, m, F), *up = row<T>(a.up, m, F);
    P *dpre = row<P>(a.dpre, m, F), *dup = row<P>(a.dup, m, F), *h = row<P>(a.h, m, F);
    for (int64_t n = 0; n < F; n += kLanes<Compute<T>>) {
      const int64_t left = F - n;
      V g = load_left(dh + n, left);
      // forward: h = act(pre) * up
      V derivative, value = Act::value(load_left(pre + n, left), derivative);
      if (up) {
        const V factor = load_left(up + n, left), gradient = g * value;
        store_left(dup + n, gradient, left);
        if (db) accumulate(db + F + n, gradient, left);
        value = value * factor;
        g = g * factor;
      }
      store_left(h + n, value, left);
      store_left(dpre + n, g * derivative, left);
      if (db) accumulate(db + n, g * derivative, left);
    }
  }
}

#define TFKERN_ACTIVATION(P, activation, function, ...)          \
  switch (activation) {                                          \
    case Activation::relu:                                       \
      return function<T, P, Relu<Compute<T>>>(__VA_ARGS__);      \
    case Activation::gelu:                                       \
      return function<T, P, Gelu<Compute<T>>>(__VA_ARGS__);      \
    case Activation::gelu_tanh:                                  \
      return function<T, P, GeluTanh<Compute<T>>>(__VA_ARGS__);  \
    case Activation::silu:                                       \
      return function<T, P, Silu<Compute<T>>>(__VA_ARGS__);      \
    case Activation::quick_gelu:                                 \
      return function<T, P, QuickGelu<Compute<T>>>(__VA_ARGS__); \
  }
#define TFKERN_MLP(function, a, ...)                                                      \
  TFKERN_DTYPE((a).dtype, {                                                               \
    if ((a).wide) TFKERN_ACTIVATION(Compute<T>, (a).activation, function, a, __VA_ARGS__) \
    TFKERN_ACTIVATION(T, (a).activation, function, a, __VA_ARGS__)                        \
  })

inline void mlp_forward(const MlpForward& a, int64_t begin, int64_t end) {
  TFKERN_MLP(forward_rows, a, begin, end);
}

inline void mlp_backward(const MlpBackward& a, int64_t begin, int64_t end, void* db) {
  TFKERN_MLP(backward_rows, a, begin, end, static_cast<Compute<T>*>(db));
}

#undef TFKERN_MLP
#undef TFKERN_ACTIVATION
