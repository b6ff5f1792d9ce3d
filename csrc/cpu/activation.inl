// Fragment of mlp.inl and linear.inl: activations of vectors. It assumes vec.inl.

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

// Evaluates the statement with `Act` naming the activation of vectors of C.
// (This file is included once for each instruction set.)
#undef TFKERN_ACTIVATION
#define TFKERN_ACTIVATION(activation, C, ...) \
  switch (activation) {                       \
    case Activation::relu: {                  \
      using Act = Relu<C>;                    \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case Activation::gelu: {                  \
      using Act = Gelu<C>;                    \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case Activation::gelu_tanh: {             \
      using Act = GeluTanh<C>;                \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case Activation::silu: {                  \
      using Act = Silu<C>;                    \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case Activation::quick_gelu: {            \
      using Act = QuickGelu<C>;               \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
  }
