// Softmax attention on the CPU: FlashAttention (Dao 2022, 2023), forward and backward.
//
//   s = scale * q k^T, masked;   o = softmax(s) v;   lse = log sum exp s
//
// q is (B, H, T, D), k (B, Hk, S, D), v (B, Hk, S, Dv); key head h / (H / Hk) serves query head h.
// Strides are arbitrary except that rows are contiguous. Query t of a batch sees key s if
// s < key_length and, if causal, s <= t + key_length - query_length. What lies beyond the lengths
// is never read. Work is cut into tiles of kKeys keys times kBlock queries, so memory is linear in
// T and S; float16 and bfloat16 are widened tile by tile and computed in float.
#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "tensor.h"

namespace tfkern {

constexpr int64_t kBlock = 64;  // queries of a tile, along the lanes
constexpr int64_t kKeys = 96;   // keys of a tile

// A (batch, head, row, feature) tensor of any element type; strides are in bytes.
struct Heads {
  char* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  Dtype dtype = Dtype::f32;
};

struct AttentionShape {
  int64_t B, H, Hk, T, S, D, Dv;
  bool causal;
  std::vector<int64_t> query_lengths, key_lengths;  // B each, in [0, T] and [0, S]
};

template <class C>
struct AttentionForward : AttentionShape {
  C scale;
  Heads q, k, v, o;
  C* lse;
};

template <class C>
struct AttentionBackward : AttentionShape {
  C scale;
  Heads d_o, q, k, v, o;
  const C *dlse, *lse;  // dlse may be null
  Heads dq, dk, dv;
  int64_t chunks;  // tasks per key head
  C* partial;      // their sums of dk and dv; null if there is one chunk only
};

// Uninitialised arrays that start at cache lines and live as long as this.
template <class C>
class Scratch {
 public:
  C* get(int64_t n) {
    void* p = ::operator new(std::max<int64_t>(n, 1) * sizeof(C), kLine);
    arrays_.emplace_back(static_cast<C*>(p));
    return arrays_.back().get();
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(C* p) const { ::operator delete(p, kLine); }
  };
  std::vector<std::unique_ptr<C, Free>> arrays_;
};

}  // namespace tfkern

#define TFKERN_KERNEL "attention_kernel.h"
#include "each_isa.h"

namespace tfkern {
namespace {

template <class C>
void run_forward(const AttentionForward<C>& a, std::atomic<int64_t>& next) {
  TFKERN_ISA_CALL(attention_forward, a, next);
}

template <class C>
void run_backward(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
  TFKERN_ISA_CALL(attention_backward, a, next);
}

template <class C>
int64_t dkv_size(const AttentionBackward<C>& a) {
  TFKERN_ISA_CALL(attention_dkv_size, a);
}

template <class C>
void store_dkv(const AttentionBackward<C>& a, int64_t b, int64_t hk, int64_t begin, int64_t count,
               C* sums, int64_t parts, int64_t distance) {
  TFKERN_ISA_CALL(attention_store_dkv, a, b, hk, begin, count, sums, parts, distance);
}

// Calls `work` once per thread with a counter that hands out tasks: who is free takes the next one.
template <class Work>
void run_tasks(const Work& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1,
                              [&](int64_t, int64_t) { work(next); });
}

Heads heads(const Tensor& t) {
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  return {static_cast<char*>(t.data_ptr()), t.stride(0) * bytes, t.stride(1) * bytes,
          t.stride(2) * bytes, dtype(t)};
}

Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

// Lengths clamped to [0, limit]; absent ones are `limit`.
std::vector<int64_t> lengths(const std::optional<Tensor>& t, int64_t B, int64_t limit) {
  std::vector<int64_t> result(B, limit);
  if (!t) return result;
  const bool wide = t->scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == B && (wide || t->scalar_type() == ScalarType::Int),
                  "tfkern::attention: expected int32 or int64 lengths of shape (B,)");
  for (int64_t b = 0; b < B; ++b) {
    const int64_t i = b * t->stride(0);
    const int64_t length = wide ? static_cast<const int64_t*>(t->data_ptr())[i]
                                : static_cast<const int32_t*>(t->data_ptr())[i];
    result[b] = std::clamp<int64_t>(length, 0, limit);
  }
  return result;
}

AttentionShape shape(const Tensor& q, const Tensor& k, const Tensor& v,
                     const std::optional<Tensor>& query_lengths,
                     const std::optional<Tensor>& key_lengths, bool causal) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "tfkern::attention: expected q, k and v with 4 dimensions");
  const int64_t B = q.size(0), H = q.size(1), Hk = k.size(1), T = q.size(2), S = k.size(2);
  STD_TORCH_CHECK(k.size(0) == B && v.size(0) == B && v.size(1) == Hk && v.size(2) == S &&
                      k.size(3) == q.size(3) && (Hk == 0 ? H == 0 : H % Hk == 0),
                  "tfkern::attention: q, k and v do not fit together");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "tfkern::attention: q, k and v must have the same dtype");
  return {B,
          H,
          Hk,
          T,
          S,
          q.size(3),
          v.size(3),
          causal,
          lengths(query_lengths, B, T),
          lengths(key_lengths, B, S)};
}

template <class C>
constexpr ScalarType kCompute = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;

template <class C>
std::tuple<Tensor, Tensor> forward(AttentionShape shape, const Tensor& q, const Tensor& k,
                                   const Tensor& v, double scale) {
  Tensor o = empty(q, {shape.B, shape.H, shape.T, shape.Dv}, q.scalar_type());
  Tensor lse = empty(q, {shape.B, shape.H, shape.T}, kCompute<C>);
  const AttentionForward<C> a{
      std::move(shape), static_cast<C>(scale),           heads(q), heads(k), heads(v),
      heads(o),         static_cast<C*>(lse.data_ptr()),
  };
  run_tasks([&](std::atomic<int64_t>& next) { run_forward(a, next); });
  return {o, lse};
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

template <class C>
Three backward(AttentionShape shape, const Tensor& d_o, const std::optional<Tensor>& dlse,
               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
               const Tensor& lse, double scale) {
  const auto [B, H, Hk, T, S, D, Dv] =
      std::array{shape.B, shape.H, shape.Hk, shape.T, shape.S, shape.D, shape.Dv};
  Tensor dq = empty(q, {B, H, T, D}, q.scalar_type());
  Tensor dk = empty(q, {B, Hk, S, D}, q.scalar_type());
  Tensor dv = empty(q, {B, Hk, S, Dv}, q.scalar_type());
  // Few heads are cut into chunks so that every thread has work. The number follows from the shape
  // alone, so that the result does not depend on the number of threads.
  const int64_t key_heads = B * Hk, blocks = Hk ? H / Hk * ((T + kBlock - 1) / kBlock) : 0;
  const int64_t chunks = std::clamp<int64_t>(16 / std::max<int64_t>(key_heads, 1), 1,
                                             std::max<int64_t>(blocks / 2, 1));
  AttentionBackward<C> a{std::move(shape),
                         static_cast<C>(scale),
                         heads(d_o),
                         heads(q),
                         heads(k),
                         heads(v),
                         heads(o),
                         dlse ? static_cast<const C*>(dlse->data_ptr()) : nullptr,
                         static_cast<const C*>(lse.data_ptr()),
                         heads(dq),
                         heads(dk),
                         heads(dv),
                         chunks,
                         nullptr};
  Scratch<C> scratch;
  const int64_t size = dkv_size(a);
  if (chunks > 1) a.partial = scratch.get(key_heads * chunks * size);
  run_tasks([&](std::atomic<int64_t>& next) { run_backward(a, next); });
  if (chunks > 1) {
    torch::stable::parallel_for(0, key_heads * S, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin, count; i < end; i += count) {
        const int64_t head = i / S, s = i % S;
        count = std::min(end - i, S - s);
        C* sums = a.partial + head * chunks * size;
        store_dkv(a, head / Hk, head % Hk, s, count, sums, chunks, size);
      }
    });
  }
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v,
                                             std::optional<Tensor> query_lengths,
                                             std::optional<Tensor> key_lengths, bool causal,
                                             double scale) {
  AttentionShape sizes = shape(q, k, v, query_lengths, key_lengths, causal);
  const bool wide = q.scalar_type() == ScalarType::Double;
  return (wide ? forward<double> : forward<float>)(std::move(sizes), with_contiguous_rows(q),
                                                   with_contiguous_rows(k), with_contiguous_rows(v),
                                                   scale);
}

Three attention_backward(Tensor d_o, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v,
                         Tensor o, Tensor lse, std::optional<Tensor> query_lengths,
                         std::optional<Tensor> key_lengths, bool causal, double scale) {
  AttentionShape sizes = shape(q, k, v, query_lengths, key_lengths, causal);
  const bool wide = q.scalar_type() == ScalarType::Double;
  const auto fits = [&](const Tensor& t) {
    return t.dim() == 4 && t.size(0) == sizes.B && t.size(1) == sizes.H && t.size(2) == sizes.T &&
           t.size(3) == sizes.Dv;
  };
  const auto saved = [&](const Tensor& t) {
    return t.numel() == sizes.B * sizes.H * sizes.T &&
           t.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float);
  };
  STD_TORCH_CHECK(fits(d_o) && fits(o) && saved(lse) && (!dlse || saved(*dlse)),
                  "tfkern::attention_backward: do, dlse, o and lse do not fit q and v");
  if (dlse) dlse = torch::stable::contiguous(*dlse);
  return (wide ? backward<double>
               : backward<float>)(std::move(sizes), with_contiguous_rows(d_o), dlse,
                                  with_contiguous_rows(q), with_contiguous_rows(k),
                                  with_contiguous_rows(v), with_contiguous_rows(o),
                                  torch::stable::contiguous(lse), scale);
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_FRAGMENT(tfkern, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? query_lengths, Tensor? key_lengths, "
      "bool causal, float scale) -> (Tensor o, Tensor lse)");
  m.def(
      "attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, "
      "Tensor lse, Tensor? query_lengths, Tensor? key_lengths, bool causal, float scale) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&tfkern::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&tfkern::attention_backward));
}
