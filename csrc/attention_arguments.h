// The arguments of attention's operators, and the checks of them that every device needs: whatever
// decides which memory a kernel touches. Lengths and page numbers lie in memory and are not checked
// here; kernels clamp them.
#pragma once

#include "tensor.h"

namespace tfkern {

// The arguments that forward and backward share, in the order of their schemas.
constexpr const char* kAttentionSchema =
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sink, "
    "Tensor? query_lengths, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? page_table, Tensor? seed, SymInt? left, SymInt? right, float scale, float softcap, "
    "float dropout_p";

struct AttentionArguments {
  Tensor q, k, v;
  Optional bias, mask, alibi_slopes, sink;
  Optional query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, page_table, seed;
  std::optional<int64_t> left, right;
  double scale, softcap, dropout_p;

  static AttentionArguments take(Stack& stack) {
    const auto tensor = [&] { return stack.tensor(); };
    const auto optional = [&] { return stack.optional(); };
    // Elements of a list in braces are evaluated in their order.
    return {tensor(),       tensor(),       tensor(),      optional(),      optional(),
            optional(),     optional(),     optional(),    optional(),      optional(),
            optional(),     optional(),     optional(),    stack.integer(), stack.integer(),
            stack.number(), stack.number(), stack.number()};
  }

  int64_t pages() const { return page_table ? page_table->size(1) : 1; }  // pages of a batch
  int64_t S() const { return k.size(2) * pages(); }
  // The number of batches, or of documents of a packed batch.
  int64_t documents() const { return cu_seqlens_q ? cu_seqlens_q->size(0) - 1 : q.size(0); }
};

// The arguments that only backward has. In its schema, the first four come before the shared
// arguments and bias_grad comes after.
struct AttentionGradients {
  Tensor d_o;
  Optional dlse;  // (B, H, T)
  Tensor o, lse;  // lse: (2, B, H, T)
  bool bias_grad = false;
};

inline void check(const AttentionArguments& in) {
  const Tensor &q = in.q, &k = in.k, &v = in.v;
  check_memory(q, k, v, in.bias, in.mask, in.alibi_slopes, in.sink, in.query_lengths,
               in.key_lengths, in.cu_seqlens_q, in.cu_seqlens_k, in.page_table, in.seed);
  check_floating(q, in.bias, in.alibi_slopes, in.sink);
  check_dropout(in.seed, in.dropout_p);
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "tfkern::attention: q, k and v must have the same dtype");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "tfkern::attention: expected q, k and v with 4 dimensions");
  const int64_t B = q.size(0), H = q.size(1), Hk = k.size(1), T = q.size(2);
  STD_TORCH_CHECK((in.page_table || k.size(0) == B) && v.size(0) == k.size(0) && v.size(1) == Hk &&
                      v.size(2) == k.size(2) && k.size(3) == q.size(3) &&
                      (Hk == 0 ? H == 0 : H % Hk == 0),
                  "tfkern::attention: q, k and v do not fit together");

  const auto integers = [](const Optional& t, int64_t dim) {
    STD_TORCH_CHECK(
        !t || ((t->scalar_type() == ScalarType::Long || t->scalar_type() == ScalarType::Int) &&
               t->dim() == dim),
        "tfkern::attention: expected int32 or int64 lengths, positions and pages");
  };
  for (const Optional* lengths : {&in.query_lengths, &in.key_lengths}) {
    integers(*lengths, 1);
    STD_TORCH_CHECK(!*lengths || (*lengths)->size(0) == B,
                    "tfkern::attention: expected lengths of shape (B,)");
  }
  integers(in.cu_seqlens_q, 1);
  integers(in.cu_seqlens_k, 1);
  STD_TORCH_CHECK(in.cu_seqlens_q.has_value() == in.cu_seqlens_k.has_value(),
                  "tfkern::attention: cu_seqlens come in pairs");
  STD_TORCH_CHECK(!in.cu_seqlens_q || (B == 1 && in.cu_seqlens_q->size(0) > 0 &&
                                       in.cu_seqlens_q->size(0) == in.cu_seqlens_k->size(0) &&
                                       !in.bias && !in.mask && !in.page_table),
                  "tfkern::attention: cu_seqlens_q and cu_seqlens_k are as long as each other, "
                  "for one batch without bias, mask and pages");
  integers(in.page_table, 2);
  STD_TORCH_CHECK(!in.page_table || (in.page_table->size(0) == B &&
                                     (k.size(0) > 0 || in.page_table->numel() == 0)),
                  "tfkern::attention: expected a page table of shape (B, pages)");
  const int64_t heads = std::max(H, Hk), features = q.size(3) + v.size(3);
  check_countable({k.size(2), in.pages()});
  check_countable({kPadding, B, heads, T, features});
  check_countable({kPadding, std::max(B, k.size(0)), heads, in.S(), features});
  check_countable({B, heads, T, in.S()});

  const int64_t scores[] = {B, H, T, in.S()};
  STD_TORCH_CHECK(!in.mask || in.mask->scalar_type() == ScalarType::Bool,
                  "tfkern::attention: expected a boolean mask");
  for (const Optional* t : {&in.bias, &in.mask}) {
    STD_TORCH_CHECK(!*t || (*t)->dim() == 4,
                    "tfkern::attention: expected bias and mask with 4 dimensions");
    for (int i = 0; *t && i < 4; ++i) {
      STD_TORCH_CHECK((*t)->size(i) == 1 || (*t)->size(i) == scores[i],
                      "tfkern::attention: bias and mask must broadcast to (B, H, T, S)");
    }
  }
  const Optional &slopes = in.alibi_slopes, &sink = in.sink;
  STD_TORCH_CHECK((!slopes || (slopes->dim() == 2 && slopes->size(0) == in.documents() &&
                               slopes->size(1) == H)) &&
                      (!sink || (sink->dim() == 1 && sink->size(0) == H)),
                  "tfkern::attention: alibi_slopes or sink do not fit q");
}

inline void check(const AttentionArguments& in, const AttentionGradients& g) {
  STD_TORCH_CHECK(!in.page_table, "tfkern::attention_backward: pages have no gradients");
  const Tensor &q = in.q, &v = in.v;
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2);
  check_memory(q, g.d_o, g.dlse, g.o, g.lse);
  const auto like_output = [&](const Tensor& t) {
    return t.dim() == 4 && t.size(0) == B && t.size(1) == H && t.size(2) == T &&
           t.size(3) == v.size(3) && t.scalar_type() == q.scalar_type();
  };
  const bool wide = q.scalar_type() == ScalarType::Double;
  const auto statistics = [&](const Tensor& t, int64_t parts) {
    return t.numel() == parts * B * H * T &&
           t.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float);
  };
  STD_TORCH_CHECK(like_output(g.d_o) && like_output(g.o) && statistics(g.lse, 2) &&
                      (!g.dlse || statistics(*g.dlse, 1)),
                  "tfkern::attention_backward: do, dlse, o and lse do not fit q and v");
}

// ---- operators ----

// attention_forward for the dispatcher: takes the arguments, checks them and calls `run`, which
// computes it on one device.
template <std::tuple<Tensor, Tensor> (*run)(const AttentionArguments&)>
void attention_forward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const AttentionArguments in = AttentionArguments::take(stack);
  check(in);
  stack.give(run(in));
}

// dq, dk, dv, dbias and dsink
using InputGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <InputGradients (*run)(const AttentionArguments&, const AttentionGradients&)>
void attention_backward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  AttentionGradients g{stack.tensor(), stack.optional(), stack.tensor(), stack.tensor()};
  const AttentionArguments in = AttentionArguments::take(stack);
  g.bias_grad = stack.boolean();
  check(in);
  check(in, g);
  g.d_o = with_contiguous_rows(g.d_o);
  g.o = with_contiguous_rows(g.o);
  g.lse = torch::stable::contiguous(g.lse);
  if (g.dlse) g.dlse = torch::stable::contiguous(*g.dlse);
  stack.give(run(in, g));
}

}  // namespace tfkern
