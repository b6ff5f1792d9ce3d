// A product of matrices as the kernels of linear.inl take it.
#pragma once

#include "../activation.h"
#include "../dtype.h"

namespace tfkern {

// Element (i, k) lies i * row + k * column elements after the first. One of the strides is 1.
// Or the matrix is packed as `linear_pack` does it: then `row` counts the elements of a panel.
struct Matrix {
  const void* data;
  int64_t row, column;
  bool packed = false;
};

// The product a b^T of a (M, K) and b (N, K).
struct Factors {
  Matrix a, b;
  int64_t K;
};

// out = sum + bias, where the sum is that of the products of all terms. With an activation, it is
// act(sum + bias), and if it is gated, act(sum0 + bias0) (sum1 + bias1).
struct LinearForward {
  Dtype dtype;  // of all matrices
  int64_t M, N;
  int64_t chunks = 1;  // into which the rows are cut
  Factors terms[2] = {};
  int count = 1;     // of terms
  bool add = false;  // to what is in out already
  bool activated = false;
  Activation activation = {};
  const void* bias[2] = {};  // (N,) or null
  void* kept[2] = {};        // sum0 + bias0 and, if gated, sum1 + bias1, unless null
  void* out = nullptr;       // (M, N), as the kept; rows lie side by side

  bool gated() const { return activated && count == 2; }
};

}  // namespace tfkern
