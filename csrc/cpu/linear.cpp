// Products of matrices on the CPU: those of a linear layer and of its gradients.
//
//     out = a b^T + a2 b2^T + bias
//
// a is (M, K) and b (N, K), with any strides; a2 and b2, if they are there, have another K. Numbers
// of 16 bits are widened as they are packed, or, where the processor multiplies pairs of bfloat16,
// enter the products as they are. Sums are float32.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <utility>

#include "../tensor.h"
#include "isa.h"
#include "linear.h"
#include "scratch.h"

#define TFKERN_KERNEL "linear.inl"
#include "each_isa.h"

namespace tfkern {
namespace {

void forward_parts(const LinearForward& a, int64_t begin, int64_t end) {
  TFKERN_ISA_CALL(linear_forward, a, begin, end);
}

int64_t panel() { TFKERN_ISA_CALL(linear_panel); }

// The matrix for the kernels. One whose rows and columns both lie apart is replaced by a copy.
Matrix matrix(Tensor& x) {
  const auto stride = [&](int64_t i) { return x.size(i) > 1 ? x.stride(i) : 1; };
  if (stride(0) != 1 && stride(1) != 1) x = torch::stable::contiguous(x);
  return {x.data_ptr(), x.size(0) > 1 ? x.stride(0) : x.size(1), stride(1)};
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
  const auto fit = [&](const Tensor& x, const Tensor& w) {
    return x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1) && x.size(0) == a.size(0) &&
           w.size(0) == b.size(0);
  };
  STD_TORCH_CHECK(fit(a, b) && a2.has_value() == b2.has_value() && (!a2 || fit(*a2, *b2)) &&
                      (!bias || is_vector(*bias, b.size(0))),
                  "tfkern::linear_product: expected a (M, K), b (N, K) and bias (N,)");
  const int64_t M = a.size(0), N = b.size(0);
  const int64_t K = a.size(1) + (a2 ? a2->size(1) : 0);
  check_countable({kPadding, M, N, std::max<int64_t>(K, 1)});
  Tensor out = empty(a, {M, N}, a.scalar_type());
  if (out.numel() == 0) return out;

  LinearForward product{dtype(a), isa() >= Isa::avx512_bf16, M, N};
  product.terms[0] = {matrix(a), matrix(b), a.size(1)};
  if (a2) product.terms[1] = {matrix(*a2), matrix(*b2), a2->size(1)};
  product.count = a2 ? 2 : 1;
  product.bias = bias ? bias->data_ptr() : nullptr;
  product.out = out.data_ptr();
  // At least 64 parts for the threads, and chunks of 112 to 2016 rows.
  const int64_t panels = (N + panel() - 1) / panel();
  product.chunks = std::max((M + 2015) / 2016, std::min(64 / panels, M / 112));
  product.chunks = std::max<int64_t>(product.chunks, 1);
  // Counts in cycles, about: to pack a unit of a panel, and to multiply it. To wake a thread for
  // less than 100000 would not pay.
  const int64_t cycles = (K + 64) * (2 * M / product.chunks + 24);
  const int64_t grain = std::max<int64_t>(1, 100000 / cycles);
  torch::stable::parallel_for(
      0, panels * product.chunks, grain,
      [&](int64_t begin, int64_t end) { forward_parts(product, begin, end); });
  return out;
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) {
  m.impl("linear_product", TORCH_BOX(&tfkern::linear_product));
}
