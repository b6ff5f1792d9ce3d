// Products of matrices on the CPU: those of a linear layer and of its gradients.
//
//     out = a b^T + a2 b2^T + bias
//
// a is (..., K) and b (N, K), with any strides; a2 and b2, if they are there, may have another K.
// Numbers of 16 bits are widened as they are packed, or, where the processor multiplies pairs of
// bfloat16, enter the products as they are. Sums are float32.
#include "linear.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <utility>

#include "../rows.h"
#include "isa.h"
#include "scratch.h"

#define TFKERN_KERNEL "linear.inl"
#include "each_isa.h"

namespace tfkern {
namespace {

void forward_parts(const LinearForward& a, int64_t begin, int64_t end) {
  TFKERN_ISA_CALL(linear_forward, a, begin, end);
}

int64_t panel() { TFKERN_ISA_CALL(linear_panel); }

// The matrix for the kernels, whose rows are all axes but the last. One whose rows and columns both
// lie apart is replaced by a copy.
Matrix matrix(Tensor& x) {
  const bool across = x.dim() == 2 && x.size(0) > 1 && x.size(1) > 1 && x.stride(0) == 1;
  if (across && x.stride(1) != 1) return {x.data_ptr(), 1, x.stride(1)};
  x = with_row_stride(x, 1);
  return {x.data_ptr(), *row_stride(x, 1), 1};
}

Tensor linear_product(Tensor a, Tensor b, Optional bias, Optional a2, Optional b2) {
  check_memory(a, b, bias, a2, b2);
  STD_TORCH_CHECK(dtype(a) != Dtype::f64,
                  "tfkern::linear_product: expected float32, bfloat16 or float16");
  each_tensor(
      [&](const Tensor& t) {
        STD_TORCH_CHECK(t.scalar_type() == a.scalar_type(),
                        "tfkern::linear_product: expected tensors of one dtype");
      },
      b, bias, a2, b2);
  const auto [M, K] = matrix_size(a, 1);
  const auto [N, columns] = matrix_size(b, 1);
  const MatrixSize size2 = a2 ? matrix_size(*a2, 1) : MatrixSize{M, 0};
  STD_TORCH_CHECK(
      b.dim() == 2 && columns == K && (!bias || (bias->dim() == 1 && bias->numel() == N)),
      "tfkern::linear_product: expected a (..., K), b (N, K) and bias (N,)");
  STD_TORCH_CHECK(a2.has_value() == b2.has_value() && size2.rows == M &&
                      (!b2 || (b2->dim() == 2 && b2->size(0) == N && b2->size(1) == size2.columns)),
                  "tfkern::linear_product: expected a2 and b2 that give a product like a and b");
  check_countable({kPadding, M, N, K});
  check_countable({kPadding, M, N, size2.columns});
  std::vector<int64_t> shape(a.sizes().begin(), a.sizes().end());
  shape.back() = N;
  Tensor out = empty(a, shape, a.scalar_type());
  if (M == 0 || N == 0) return out;

  LinearForward product{dtype(a), isa() >= Isa::avx512_bf16, M, N};
  product.terms[0] = {matrix(a), matrix(b), K};
  if (a2) product.terms[1] = {matrix(*a2), matrix(*b2), size2.columns};
  product.count = a2 ? 2 : 1;
  if (bias) bias = torch::stable::contiguous(*bias);
  product.bias = bias ? bias->data_ptr() : nullptr;
  product.out = out.data_ptr();
  // How the result is cut does not change it: each element is a sum of its own. There are chunks of
  // at most 2016 rows, and more of them, down to 112 rows, if there are few panels for each thread.
  const int64_t panels = (N + panel() - 1) / panel(), threads = torch::stable::get_num_threads();
  const int64_t wanted = threads > 1 ? 4 * threads / panels : 1;
  product.chunks = std::max({int64_t{1}, (M + 2015) / 2016, std::min(wanted, M / 112)});
  // Counts in cycles, about: to pack a unit of a panel, and to multiply it. To wake a thread for
  // less than 100000 would not pay.
  const int64_t cycles = (K + size2.columns + 64) * (2 * M / product.chunks + 24);
  const int64_t grain = std::max<int64_t>(1, 100000 / cycles);
  torch::stable::parallel_for(0, panels * product.chunks, grain, [&](int64_t begin, int64_t end) {
    forward_parts(product, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) {
  m.impl("linear_product", TORCH_BOX(&tfkern::linear_product));
}
