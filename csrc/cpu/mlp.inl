// Fragment of mlp.cpp, compiled once per instruction set: the kernels for rows [begin, end) of the
// arguments. It assumes vec.inl.

#include "activation.inl"

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

// Computes h.
template <class T, class Act>
void forward_rows(const MlpForward& a, int64_t begin, int64_t end) {
  using V = Vec<Compute<T>>;
  const int64_t F = a.F;
  for (int64_t m = begin; m < end; ++m) {
    const T *pre = row<T>(a.pre, m, F), *up = row<T>(a.up, m, F);
    T* h = row<T>(a.h, m, F);
    for (int64_t n = 0; n < F; n += kLanes<Compute<T>>) {
      const int64_t left = F - n;
      V derivative, value = Act::value(load_left(pre + n, left), derivative);
      if (up) value = value * load_left(up + n, left);
      store_left(h + n, value, left);
    }
  }
}

// Computes dpre, dup and h. Unless db is null, adds the sums of dpre over the rows to its first F
// elements, and the sums of dup to the next F.
template <class T, class Act>
void backward_rows(const MlpBackward& a, int64_t begin, int64_t end, Compute<T>* db) {
  using V = Vec<Compute<T>>;
  const int64_t F = a.F;
  for (int64_t m = begin; m < end; ++m) {
    const T *dh = row<T>(a.dh, m, F), *pre = row<T>(a.pre, m, F), *up = row<T>(a.up, m, F);
    T *dpre = row<T>(a.dpre, m, F), *dup = row<T>(a.dup, m, F), *h = row<T>(a.h, m, F);
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

#define TFKERN_MLP(function, a, ...)                                    \
  TFKERN_DTYPE((a).dtype, TFKERN_ACTIVATION((a).activation, Compute<T>, \
                                            { return function<T, Act>(a, __VA_ARGS__); }))

inline void mlp_forward(const MlpForward& a, int64_t begin, int64_t end) {
  TFKERN_MLP(forward_rows, a, begin, end);
}

inline void mlp_backward(const MlpBackward& a, int64_t begin, int64_t end, void* db) {
  TFKERN_MLP(backward_rows, a, begin, end, static_cast<Compute<T>*>(db));
}

#undef TFKERN_MLP
