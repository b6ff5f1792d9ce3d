// A product of matrices as the kernels of linear.inl take it.
#pragma once

#include "../dtype.h"

namespace tfkern {

// Element (i, k) lies i * row + k * column elements after the first. One of the strides is 1.
struct Matrix {
  const void* data;
  int64_t row, column;
};

// The product a b^T of a (M, K) and b (N, K).
struct Factors {
  Matrix a, b;
  int64_t K;
};

struct LinearForward {
  Dtype dtype;  // of all matrices
  bool pairs;   // the processor multiplies pairs of bfloat16
  int64_t M, N;
  Factors terms[2];  // out is the sum of the products
  int count;         // of terms
  int64_t chunks;    // into which the rows are cut
  const void* bias;  // (N,) or null
  void* out;         // (M, N), its rows side by side
};

}  // namespace tfkern
