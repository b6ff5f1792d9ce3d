// Rotary positions on the CPU. Each vector of a head is read once and written once. Tokens go
// through the kernel in blocks: all heads of a block are turned while the block's rows of cos and
// sin are in the L1 cache.
#include <torch/csrc/stable/ops.h>

#include "../rotary_arguments.h"
#include "isa.h"

namespace tfkern {

// A tensor (B, H, T, D), or (B, T, R) with H = 1, of any element type and strides; null data stands
// for an absent one.
struct Heads {
  char* data = nullptr;
  int64_t H = 0;
  int64_t batch = 0, head = 0, token = 0;  // strides in bytes
  int64_t feature = 1;                     // stride in elements
  Dtype dtype = Dtype::f32;
};

struct Rotary {
  int64_t T, D, R;
  int64_t blocks;  // of tokens, in each batch
  bool interleaved, inverse;
  Heads cos, sin;
  Heads x[2], y[2];  // q and k, and the results, which may be in the same place
};

constexpr int64_t kBlock = 16;  // tokens

}  // namespace tfkern

#define TFKERN_KERNEL "rotary.inl"
#include "each_isa.h"

namespace tfkern {
namespace {

template <class C>
void turn(const Rotary& a, int64_t begin, int64_t end) {
  TFKERN_ISA_CALL(turn, C{}, a, begin, end);
}

Heads heads(const Tensor& t) {
  const int64_t bytes = static_cast<int64_t>(t.element_size()), last = t.dim() - 1;
  const bool has_heads = last == 3;
  return {data<char>(t),
          has_heads ? t.size(1) : 1,
          t.stride(0) * bytes,
          has_heads ? t.stride(1) * bytes : 0,
          t.stride(last - 1) * bytes,
          t.size(last) == 1 ? 1 : t.stride(last),
          dtype(t)};
}

Heads heads(const Optional& t) { return t ? heads(*t) : Heads{}; }

// Turns q and k. The results are new tensors, or q and k themselves.
void run(const Tensor& q, const Optional& k, const Tensor& cos, const Tensor& sin, bool interleaved,
         bool inverse, const Tensor& q_out, const Optional& k_out) {
  const int64_t T = q.size(2), D = q.size(3);
  const int64_t blocks = (T + kBlock - 1) / kBlock;
  const Rotary a{T,
                 D,
                 cos.size(2),
                 blocks,
                 interleaved,
                 inverse,
                 heads(cos),
                 heads(sin),
                 {heads(q), heads(k)},
                 {heads(q_out), heads(k_out)}};
  const int64_t elements = std::min(T, kBlock) * D * (a.x[0].H + a.x[1].H);  // of a block
  if (elements == 0) return;
  const int64_t grain = std::max<int64_t>(1, 32768 / elements);
  torch::stable::parallel_for(0, q.size(0) * blocks, grain, [&](int64_t begin, int64_t end) {
    (a.x[0].dtype == Dtype::f64 ? turn<double> : turn<float>)(a, begin, end);
  });
}

std::tuple<Tensor, Tensor> rotary(Tensor q, Optional k, Tensor cos, Tensor sin, bool interleaved,
                                  bool inverse) {
  check_rotary(q, k, cos, sin);
  const auto outputs = rotary_outputs(q, k, inverse);
  const auto& [q_out, k_out] = outputs;
  run(q, k, cos, sin, interleaved, inverse, q_out, k ? Optional(k_out) : std::nullopt);
  return outputs;
}

void rotary_(Tensor q, Optional k, Tensor cos, Tensor sin, bool interleaved, bool inverse) {
  check_rotary(q, k, cos, sin);
  run(q, k, cos, sin, interleaved, inverse, q, k);
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) {
  m.impl("rotary", TORCH_BOX(&tfkern::rotary));
  m.impl("rotary_", TORCH_BOX(&tfkern::rotary_));
}
