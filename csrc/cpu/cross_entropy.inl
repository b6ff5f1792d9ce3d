// Fragment of cross_entropy.cpp, compiled once per instruction set: the kernels for rows
// [begin, end) of the arguments. It assumes vec.inl.

// e^x of x <= 0. Results below 2^-126 become 0.
inline VecFloat exp_flush(VecFloat x) { return exp2_flush(x * 1.44269504f); }
inline VecDouble exp_flush(VecDouble x) { return exp(x); }

// s = softcap tanh(z / softcap), or z without a softcap
template <class C>
inline Vec<C> capped(Vec<C> z, C softcap) {
  return softcap > 0 ? softcap * tanh(z / softcap) : z;
}
template <class T>
inline Compute<T> capped_element(const T* z, Compute<T> softcap) {
  return capped(load(z, 1), softcap)[0];
}

// What a row's target decides: loss = own (lse - s_t) + label_smoothing * ...
template <class C>
inline C own_factor(const CrossEntropy<C>& a, int64_t target) {
  if (target < 0 || target >= a.V) return std::numeric_limits<C>::quiet_NaN();
  return (1 - a.label_smoothing) * (a.weight ? a.weight[target] : C{1});
}

// The sum of e^(s_n - shift) over a row as far as it was read, and sum w_n (s_n - base) for label
// smoothing, whose terms are small beside a large mean of the logits.
template <class C>
struct RowSums {
  C top = -std::numeric_limits<C>::infinity();  // the largest s_n
  C shift = 0;                                  // top, unless that is -inf
  C base = 0;
  double exponentials = 0, spread = 0;

  // Takes the largest element of the next block into account.
  void raise(C block_top) {
    if (!(block_top > top)) return;
    const C next = block_top;
    exponentials *= top == -std::numeric_limits<C>::infinity() ? 0.0 : std::exp(double{top} - next);
    if (top == -std::numeric_limits<C>::infinity()) base = next;
    top = shift = next;
  }
};

template <class C, class T>
inline void sum_row(const CrossEntropy<C>& a, const T* z, RowSums<C>& sums) {
  constexpr int L = kLanes<C>;
  constexpr int kChains = 4;  // independent sums, none of which waits for another
  constexpr int64_t kBlock = 64 * L;
  const Vec<C> least = broadcast(-std::numeric_limits<C>::infinity());
  C s[kBlock];
  for (int64_t first = 0; first < a.columns; first += kBlock) {
    const int64_t count = std::min(kBlock, a.columns - first);
    const int64_t steps = (count + kChains * L - 1) / (kChains * L) * kChains * L;
    Vec<C> top[kChains] = {least, least, least, least};
    int64_t n = 0;
    for (; n + kChains * L <= count; n += kChains * L) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        const Vec<C> v = capped(load(z + first + n + i * L), a.softcap);
        store(s + n + i * L, v);
        top[i] = vmax(v, top[i]);
      }
    }
    for (; n < steps; n += L) {
      const int left = static_cast<int>(std::clamp<int64_t>(count - n, 0, L));
      const Vec<C> v = iota<C>() < left ? capped(load(z + first + n, left), a.softcap) : least;
      store(s + n, v);
      top[0] = vmax(v, top[0]);
    }
    sums.raise(max<C>(vmax(vmax(top[0], top[1]), vmax(top[2], top[3]))));

    Vec<C> exponentials[kChains] = {};
    for (n = 0; n < steps; n += kChains * L) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        exponentials[i] = exponentials[i] + exp_flush(load(s + n + i * L) - sums.shift);
      }
    }
    sums.exponentials +=
        sum<C>((exponentials[0] + exponentials[1]) + (exponentials[2] + exponentials[3]));
    if (a.label_smoothing > 0) {
      Vec<C> spread{};
      for (n = 0; n < count; n += L) {
        const int left = static_cast<int>(std::min<int64_t>(count - n, L));
        Vec<C> term = load(s + n) - sums.base;
        if (a.weight) term = term * load(a.weight + first + n, left);
        spread = spread + (iota<C>() < left ? term : Vec<C>{});
      }
      sums.spread += sum<C>(spread);
    }
  }
}

// Computes loss, lse and rest of rows [begin, end).
template <class C>
void cross_entropy_forward(const CrossEntropyForward<C>& a, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const int64_t target = a.targets[m];
    const bool ignored = target == a.ignore_index;
    if (ignored && !a.ignored_lse) {
      a.loss[m] = a.lse[m] = a.rest[m] = 0;
      continue;
    }
    TFKERN_COMPUTED(C, a.dtype, {
      const T* z = reinterpret_cast<const T*>(a.logits) + a.rows(m);
      RowSums<C> sums;
      sum_row(a, z, sums);
      const C log_sum = static_cast<C>(std::log(sums.exponentials));
      const C lse = sums.shift + log_sum;
      a.lse[m] = lse;
      a.rest[m] = std::isfinite(lse) ? (sums.shift - lse) + log_sum : C{0};
      C loss = 0;
      if (!ignored) {
        const C own = own_factor(a, target);
        const C s_t = std::isnan(own) ? C{0} : capped_element(z + target, a.softcap);
        loss = own * ((sums.shift - s_t) + log_sum);
        if (a.label_smoothing > 0) {  // sum_n w_n (lse - s_n)
          const double all = double{a.weights} * ((double{sums.shift} - sums.base) + log_sum);
          loss += static_cast<C>(a.label_smoothing * (all - sums.spread) / a.V);
        }
      }
      a.loss[m] = loss;
    });
  }
}

// dz of the columns of a row; `total` and `share` are the factors of p_n and of w_n.
template <class C, class T>
inline void gradient_row(const CrossEntropy<C>& a, const T* z, C lse, C rest, C total, C share,
                         T* dz) {
  constexpr int L = kLanes<C>;
  const C* weight = a.weight ? a.weight + a.first : nullptr;
  for (int64_t n = 0; n < a.columns; n += L) {
    const int left = static_cast<int>(std::min<int64_t>(a.columns - n, L));
    const Vec<C> s = capped(left == L ? load(z + n) : load(z + n, left), a.softcap);
    // forward: loss = own (lse - s_t) + label_smoothing sum_n w_n (lse - s_n) / V
    Vec<C> ds = total * exp_flush((s - lse) - rest);
    if (share != 0) {
      ds = ds - (weight ? share * (left == L ? load(weight + n) : load(weight + n, left))
                        : broadcast(share));
    }
    // forward: s = softcap tanh(z / softcap)
    if (a.softcap > 0) ds = ds * (1 - (s / a.softcap) * (s / a.softcap));
    store_as(dz + n, ds, left);
  }
}

// Computes the gradient of the logits of rows [begin, end).
template <class C>
void cross_entropy_backward(const CrossEntropyBackward<C>& a, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const int64_t target = a.targets[m];
    const C dloss = a.dloss && target != a.ignore_index ? a.dloss[m] : C{0};
    const C dlse = a.dlse ? a.dlse[m] : C{0};
    TFKERN_COMPUTED(C, a.dtype, {
      const T* z = reinterpret_cast<const T*>(a.logits) + a.rows(m);
      T* dz = reinterpret_cast<T*>(a.dlogits) + a.dlogits_rows(m);
      if (dloss == 0 && dlse == 0) {  // the logits, which may hold NaN, are not read
        std::memset(dz, 0, a.columns * sizeof(T));
        continue;
      }
      const C own = dloss == 0 ? C{0} : own_factor(a, target);
      const C share = dloss * a.label_smoothing / a.V;
      const C total = dloss * own + share * a.weights + dlse;
      const int64_t column = target - a.first;
      const bool here = dloss != 0 && column >= 0 && column < a.columns;
      // It is read before dz is written, which may be z.
      const C s_t = here ? capped_element(z + column, a.softcap) : C{0};
      gradient_row(a, z, a.lse[m], a.rest[m], total, share, dz);
      if (here) {
        C ds = total * std::exp((s_t - a.lse[m]) - a.rest[m]) - dloss * own;
        ds -= share * (a.weight ? a.weight[target] : C{1});
        if (a.softcap > 0) ds *= 1 - (s_t / a.softcap) * (s_t / a.softcap);
        store(dz + column, broadcast(ds), 1);
      }
    });
  }
}
