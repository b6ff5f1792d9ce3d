// Products of matrices on the CPU: those of a linear layer and of its gradients, and the first
// layer of an MLP with its activation.
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

#include "../mlp_arguments.h"
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

int64_t unit(Dtype dtype) { TFKERN_ISA_CALL(linear_unit, dtype); }

// The matrix for the kernels, whose rows are all axes but the last. One whose rows and columns both
// lie apart is replaced by a copy.
Matrix matrix(Tensor& x) {
  const bool across = x.dim() == 2 && x.size(0) > 1 && x.size(1) > 1 && x.stride(0) == 1;
  if (across && x.stride(1) != 1) return {x.data_ptr(), 1, x.stride(1)};
  x = with_row_stride(x, 1);
  return {x.data_ptr(), *row_stride(x, 1), 1};
}

// A bias whose elements lie side by side, and its address.
const void* address(Optional& bias) {
  if (bias) bias = torch::stable::contiguous(*bias);
  return bias ? bias->data_ptr() : nullptr;
}

// The shape of x with another last size.
std::vector<int64_t> with_columns(const Tensor& x, int64_t N) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  return shape;
}

template <class... T>
void check(const Tensor& a, const Tensor& b, const T&... others) {
  check_memory(a, b, others...);
  STD_TORCH_CHECK(dtype(a) != Dtype::f64, "tfkern: expected float32, bfloat16 or float16");
  each_tensor(
      [&](const Tensor& t) {
        STD_TORCH_CHECK(t.scalar_type() == a.scalar_type(),
                        "tfkern: expected tensors of one dtype");
      },
      b, others...);
}

// Tells whether there is no bias, or one of N elements.
bool fits(const Optional& bias, int64_t N) {
  return !bias || (bias->dim() == 1 && bias->size(0) == N);
}

// Tells whether w is an (N, K) matrix.
bool is_weight(const Tensor& w, int64_t N, int64_t K) {
  return w.dim() == 2 && w.size(0) == N && w.size(1) == K;
}

void run(LinearForward& a) {
  if (a.M == 0 || a.N == 0) return;
  // How the result is cut does not change it: each element is a sum of its own. There are more
  // chunks than kMostRows asks for if there are few panels for each thread.
  constexpr int64_t kMostRows = 2016, kFewestRows = 112;  // multiples of AVX-512's tiles of 14 rows
  const int64_t panels = (a.N + panel() - 1) / panel(), threads = torch::stable::get_num_threads();
  const int64_t wanted = threads > 1 ? 4 * threads / panels : 1;
  a.chunks = std::max(
      {int64_t{1}, (a.M + kMostRows - 1) / kMostRows, std::min(wanted, a.M / kFewestRows)});
  // Counts in cycles, about: to pack a unit of a panel, and to multiply it. To wake a thread for
  // less than 100000 would not pay.
  const int64_t cycles = (a.terms[0].K + a.terms[1].K + 64) * (2 * a.M / a.chunks + 24);
  const int64_t grain = std::max<int64_t>(1, 100000 / cycles);
  torch::stable::parallel_for(0, panels * a.chunks, grain,
                              [&](int64_t begin, int64_t end) { forward_parts(a, begin, end); });
}

Tensor linear_product(Tensor a, Tensor b, Optional bias, Optional a2, Optional b2) {
  check(a, b, bias, a2, b2);
  const auto [M, K] = matrix_size(a, 1);
  const int64_t N = b.dim() == 2 ? b.size(0) : -1;
  STD_TORCH_CHECK(is_weight(b, N, K) && fits(bias, N),
                  "tfkern::linear_product: expected a (..., K), b (N, K) and bias (N,)");
  const MatrixSize size2 = a2 ? matrix_size(*a2, 1) : MatrixSize{M, 0};
  STD_TORCH_CHECK(a2.has_value() == b2.has_value() && size2.rows == M &&
                      (!b2 || is_weight(*b2, N, size2.columns)),
                  "tfkern::linear_product: expected a2 and b2 that give a product like a and b");
  check_countable({kPadding, M, N, K});
  check_countable({kPadding, M, N, size2.columns});
  Tensor out = empty(a, with_columns(a, N), a.scalar_type());

  LinearForward product{dtype(a), M, N};
  product.terms[0] = {matrix(a), matrix(b), K};
  if (a2) product.terms[1] = {matrix(*a2), matrix(*b2), size2.columns};
  product.count = a2 ? 2 : 1;
  product.bias[0] = address(bias);
  product.out = out.data_ptr();
  run(product);
  return out;
}

// out = a b^T + bias, or out += a b^T + bias. The elements of `out` lie one after the other, and it
// shares no memory with the other tensors.
void linear_product_(Tensor out, Tensor a, Tensor b, Optional bias, bool add) {
  check(a, b, bias, out);
  const auto [M, K] = matrix_size(a, 1);
  const int64_t N = b.dim() == 2 ? b.size(0) : -1;
  STD_TORCH_CHECK(is_weight(b, N, K) && fits(bias, N),
                  "tfkern::linear_product_: expected a (..., K), b (N, K) and bias (N,)");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == M && out.size(1) == N && out.is_contiguous(),
                  "tfkern::linear_product_: expected a contiguous out (M, N)");
  check_countable({kPadding, M, N, K});
  LinearForward product{dtype(a), M, N};
  product.terms[0] = {matrix(a), matrix(b), K};
  product.bias[0] = address(bias);
  product.add = add;
  product.out = out.data_ptr();
  run(product);
}

// h = act(x w^T + b), or act(x w^T + b) (x w_up^T + b_up) if there is w_up. If `keep`, the second
// result has the factors x w^T + b and x w_up^T + b_up one after the other.
std::tuple<Tensor, Tensor> mlp_hidden(Tensor x, Tensor w, Optional b, Optional w_up, Optional b_up,
                                      ActivationName activation, bool keep) {
  const std::string name = take(activation);
  check(x, w, b, w_up, b_up);
  const auto [M, K] = matrix_size(x, 1);
  const int64_t F = w.dim() == 2 ? w.size(0) : -1;
  STD_TORCH_CHECK(x.dim() == 2 && is_weight(w, F, K) && fits(b, F),
                  "tfkern::mlp_hidden: expected x (M, K), w (F, K) and b (F,)");
  STD_TORCH_CHECK((!w_up || is_weight(*w_up, F, K)) && (!b_up || w_up) && fits(b_up, F),
                  "tfkern::mlp_hidden: expected w_up and b_up of the sizes of w and b");
  check_countable({kPadding, M, F, K});
  LinearForward product{dtype(x), M, F};
  product.activated = true;
  product.activation = parse_activation(name);
  product.count = w_up ? 2 : 1;
  Tensor h = empty(x, {M, F}, x.scalar_type());
  Tensor kept =
      keep ? empty(x, {product.count, M, F}, x.scalar_type()) : absent(x, x.scalar_type());

  product.terms[0] = {matrix(x), matrix(w), K};
  if (w_up) product.terms[1] = {product.terms[0].a, matrix(*w_up), K};
  product.bias[0] = address(b);
  product.bias[1] = address(b_up);
  for (int i = 0; i < product.count; ++i) {
    if (keep) product.kept[i] = data<char>(kept) + i * M * F * h.element_size();
  }
  product.out = h.data_ptr();
  run(product);
  return {h, kept};
}

// ---- weights that are packed ahead ----

// T is any type of the size of an element.
template <class T>
void pack_panel(const Matrix& w, int64_t row, int64_t rows, int64_t columns, int64_t K,
                int64_t elements, int64_t size, T* out) {
  const T* p = static_cast<const T*>(w.data) + row * w.row;
  std::fill(out, out + size, T{0});
  for (int64_t k = 0; k < K; ++k) {
    T* to = out + k / elements * columns * elements + k % elements;
    for (int64_t j = 0; j < rows; ++j) to[j * elements] = p[j * w.row + k * w.column];
  }
}

// The rows of w (N, K) in panels, as this processor's kernels read them: (panels, units of K, rows
// of a panel, elements of a unit), with zeros behind the last row and column.
Tensor linear_pack(Tensor w) {
  check(w, w);
  STD_TORCH_CHECK(w.dim() == 2, "tfkern::linear_pack: expected a matrix");
  const int64_t N = w.size(0), K = w.size(1), columns = panel(), elements = unit(dtype(w));
  check_countable({kPadding, kPadding, N, K});
  const int64_t panels = (N + columns - 1) / columns, units = (K + elements - 1) / elements;
  Tensor out = empty(w, {panels, units, columns, elements}, w.scalar_type());
  const Matrix rows = matrix(w);
  const int64_t size = units * columns * elements;
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * columns, count = std::min(N - row, columns);
      if (w.element_size() == 2) {
        pack_panel(rows, row, count, columns, K, elements, size, data<uint16_t>(out) + i * size);
      } else {
        pack_panel(rows, row, count, columns, K, elements, size, data<uint32_t>(out) + i * size);
      }
    }
  });
  return out;
}

// Tells whether w is what linear_pack makes of an (N, K) matrix of this dtype.
bool is_packed(const Tensor& w, int64_t N, int64_t K) {
  if (w.dim() != 4 || !w.is_contiguous()) return false;
  const int64_t columns = panel(), elements = unit(dtype(w)), rows = w.size(0) * columns;
  return N <= rows && N > rows - columns && w.size(1) == (K + elements - 1) / elements &&
         w.size(2) == columns && w.size(3) == elements;
}

Matrix packed_matrix(const Tensor& w) {
  return {w.data_ptr(), w.size(1) * w.size(2) * w.size(3), 1, true};
}

// y = x w^T + b of w with N rows. With an activation it is act(x w^T + b), and with w_up, too,
// act(x w^T + b) (x w_up^T + b_up). w and w_up are packed.
Tensor linear_packed(Tensor x, Tensor w, Optional b, Optional w_up, Optional b_up, int64_t N,
                     ActivationName activation) {
  const std::string name = take(activation);
  check(x, w, b, w_up, b_up);
  const auto [M, K] = matrix_size(x, 1);
  STD_TORCH_CHECK(N >= 0 && is_packed(w, N, K) && fits(b, N),
                  "tfkern::linear_packed: expected x (..., K), w packed from (N, K) and b (N,)");
  STD_TORCH_CHECK((!w_up || is_packed(*w_up, N, K)) && (!b_up || w_up) && fits(b_up, N),
                  "tfkern::linear_packed: expected w_up and b_up of the sizes of w and b");
  STD_TORCH_CHECK(!w_up || !name.empty(), "tfkern::linear_packed: w_up needs an activation");
  check_countable({kPadding, M, N, K});
  Tensor out = empty(x, with_columns(x, N), x.scalar_type());
  LinearForward product{dtype(x), M, N};
  product.activated = !name.empty();
  if (product.activated) product.activation = parse_activation(name);
  product.count = w_up ? 2 : 1;
  product.terms[0] = {matrix(x), packed_matrix(w), K};
  if (w_up) product.terms[1] = {product.terms[0].a, packed_matrix(*w_up), K};
  product.bias[0] = address(b);
  product.bias[1] = address(b_up);
  product.out = out.data_ptr();
  run(product);
  return out;
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) {
  m.impl("linear_product", TORCH_BOX(&tfkern::linear_product));
  m.impl("linear_product_", TORCH_BOX(&tfkern::linear_product_));
  m.impl("mlp_hidden", TORCH_BOX(&tfkern::mlp_hidden));
  m.impl("linear_pack", TORCH_BOX(&tfkern::linear_pack));
  m.impl("linear_packed", TORCH_BOX(&tfkern::linear_packed));
}
