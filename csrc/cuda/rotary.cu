// Rotary positions; tfkern/reference/rotary.py has the formulas. A thread turns a few pairs in up
// to kHeads heads of one token: it loads their entries of cos and sin once and keeps them in
// registers, loads the pairs of a head 16 bytes or more at a time, and stores the results, which
// may lie in the place of the pairs. One launch turns q and k.
#include "../rotary_arguments.h"
#include "elements.h"

namespace tfkern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 4;  // heads that a thread turns one after the other
constexpr int V = 8;       // consecutive elements that a thread loads or stores at once

// A tensor (B, H, T, D), or (B, T, R) with H = 1, whose features lie one after the other; null data
// stands for an absent one.
struct Heads {
  char* data = nullptr;
  int64_t H = 0;
  int64_t batch = 0, head = 0, token = 0;  // strides in bytes
  Dtype dtype = Dtype::f32;
  bool aligned = false;  // every vector starts at a multiple of 16 bytes
};

struct Rotary {
  int64_t T, D, R;
  int64_t pieces;   // pieces of a vector: those of turned features, then those to copy
  int64_t turned;   // pieces of turned features
  int64_t groups;   // groups of kHeads heads of q and of k
  int64_t threads;  // pieces of all vectors
  bool interleaved, inverse;
  Heads cos, sin;
  Heads x[2], y[2];  // q and k, and the results
};

// The vector of a head at a token, from the feature `first` on.
__device__ Matrix vector(const Heads& x, int64_t b, int64_t h, int64_t t, int64_t first) {
  const int64_t bytes = first * (x.dtype == Dtype::f32 ? 4 : 2);
  return {x.data + b * x.batch + h * x.head + t * x.token + bytes, 0, x.dtype,
          x.aligned && bytes % 16 == 0};
}

// Loads or stores elements [column, column + V) of a vector of n elements.
__device__ Pieces piece(int64_t column, int64_t n) { return {0, 0, 1, column, 0, n}; }

__global__ void __launch_bounds__(kThreads) forward_kernel(Rotary a) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.threads) return;
  const int64_t p = i % a.pieces;
  i /= a.pieces;
  int64_t group = i % a.groups;
  i /= a.groups;
  const int64_t b = i / a.T, t = i % a.T;
  const int64_t q_groups = (a.x[0].H + kHeads - 1) / kHeads;
  const int which = group < q_groups ? 0 : 1;
  if (which == 1) group -= q_groups;
  const Heads x = a.x[which], y = a.y[which];
  const int64_t begin = group * kHeads;
  const int64_t end = begin + kHeads < x.H ? begin + kHeads : x.H;

  if (p >= a.turned) {  // copy
    const Pieces at = piece((p - a.turned) * V, a.D - a.R);
    for (int64_t h = begin; h < end; ++h) {
      float v[1][V];
      load(v, vector(x, b, h, t, a.R), at);
      store(vector(y, b, h, t, a.R), v, at);
    }
    return;
  }
  if (a.interleaved) {
    const Pieces at = piece(p * V, a.R);
    float c[1][V], s[1][V];
    load(c, vector(a.cos, b, 0, t, 0), at);
    load(s, vector(a.sin, b, 0, t, 0), at);
    for (int64_t h = begin; h < end; ++h) {
      float v[1][V];
      load(v, vector(x, b, h, t, 0), at);
#pragma unroll
      for (int j = 0; j < V; j += 2) {
        const float xi = v[0][j], xj = v[0][j + 1];
        const float u = a.inverse ? -s[0][j + 1] : s[0][j], w = a.inverse ? -s[0][j] : s[0][j + 1];
        v[0][j] = xi * c[0][j] - xj * u;
        v[0][j + 1] = xj * c[0][j + 1] + xi * w;
      }
      store(vector(y, b, h, t, 0), v, at);
    }
    return;
  }
  const int64_t half = a.R / 2;
  const Pieces at = piece(p * V, half);
  float ci[1][V], cj[1][V], si[1][V], sj[1][V];
  load(ci, vector(a.cos, b, 0, t, 0), at);
  load(cj, vector(a.cos, b, 0, t, half), at);
  load(si, vector(a.sin, b, 0, t, 0), at);
  load(sj, vector(a.sin, b, 0, t, half), at);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float u = a.inverse ? -sj[0][j] : si[0][j], w = a.inverse ? -si[0][j] : sj[0][j];
    si[0][j] = u;
    sj[0][j] = w;
  }
  for (int64_t h = begin; h < end; ++h) {
    float xi[1][V], xj[1][V];
    load(xi, vector(x, b, h, t, 0), at);
    load(xj, vector(x, b, h, t, half), at);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float turned = xi[0][j] * ci[0][j] - xj[0][j] * si[0][j];
      xj[0][j] = xj[0][j] * cj[0][j] + xi[0][j] * sj[0][j];
      xi[0][j] = turned;
    }
    store(vector(y, b, h, t, 0), xi, at);
    store(vector(y, b, h, t, half), xj, at);
  }
}

// ---- operators ----

bool has_dense_features(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1;
}

Tensor with_dense_features(const Tensor& t) {
  return has_dense_features(t) ? t : torch::stable::contiguous(t);
}

Optional with_dense_features(const Optional& t) {
  return t ? Optional(with_dense_features(*t)) : std::nullopt;
}

Heads heads(const Tensor& t) {
  const int64_t bytes = static_cast<int64_t>(t.element_size()), last = t.dim() - 1;
  Heads x{data<char>(t),
          last == 3 ? t.size(1) : 1,
          t.stride(0) * bytes,
          last == 3 ? t.stride(1) * bytes : 0,
          t.stride(last - 1) * bytes,
          dtype(t)};
  x.aligned = (reinterpret_cast<uintptr_t>(x.data) | x.batch | x.head | x.token) % 16 == 0;
  return x;
}

Heads heads(const Optional& t) { return t ? heads(*t) : Heads{}; }

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Turns q and k. The results are new tensors, or q and k themselves. Features lie one after the
// other in all of them.
void run(const Tensor& q, const Optional& k, const Tensor& cos, const Tensor& sin, bool interleaved,
         bool inverse, const Tensor& q_out, const Optional& k_out) {
  const int64_t B = q.size(0), T = q.size(2), D = q.size(3), R = cos.size(2);
  Rotary a{T,
           D,
           R,
           0,
           0,
           0,
           0,
           interleaved,
           inverse,
           heads(cos),
           heads(sin),
           {heads(q), heads(k)},
           {heads(q_out), heads(k_out)}};
  a.turned = parts(interleaved ? R : R / 2, V);
  a.pieces = a.turned + (a.x[0].data == a.y[0].data ? 0 : parts(D - R, V));
  a.groups = parts(a.x[0].H, kHeads) + parts(a.x[1].H, kHeads);
  a.threads = B * T * a.groups * a.pieces;
  if (a.threads == 0) return;
  launch(Device(q), forward_kernel, parts(a.threads, kThreads), kThreads, 0, a);
}

std::tuple<Tensor, Tensor> rotary(Tensor q, Optional k, Tensor cos, Tensor sin, bool interleaved,
                                  bool inverse) {
  check_rotary(q, k, cos, sin);
  check_no_float64(q, k, cos, sin);
  const auto outputs = rotary_outputs(q, k, inverse);
  const auto& [q_out, k_out] = outputs;
  run(with_dense_features(q), with_dense_features(k), with_dense_features(cos),
      with_dense_features(sin), interleaved, inverse, q_out, k ? Optional(k_out) : std::nullopt);
  return outputs;
}

void rotary_(Tensor q, Optional k, Tensor cos, Tensor sin, bool interleaved, bool inverse) {
  check_rotary(q, k, cos, sin);
  check_no_float64(q, k, cos, sin);
  Tensor q_dense = with_dense_features(q);
  const Optional k_dense = with_dense_features(k);
  run(q_dense, k_dense, with_dense_features(cos), with_dense_features(sin), interleaved, inverse,
      q_dense, k_dense);
  if (!has_dense_features(q)) torch::stable::copy_(q, q_dense);
  if (k && !has_dense_features(*k)) torch::stable::copy_(*k, *k_dense);
}

}  // namespace
}  // namespace tfkern::cuda

TFKERN_CUDA_LIBRARY(m) {
  m.impl("rotary", TORCH_BOX(&tfkern::cuda::rotary));
  m.impl("rotary_", TORCH_BOX(&tfkern::cuda::rotary_));
}
