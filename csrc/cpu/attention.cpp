// Softmax attention on the CPU: FlashAttention (Dao 2022, 2023), forward and backward.
//
// clang-format off
//   s = scale q k^T, modified and masked;   o = dropout(softmax(s)) v;   lse = log sum exp s
// clang-format on
//
// tfkern/reference/attention.py defines all options. q is (B, H, T, D), k (B, Hk, S, D), v
// (B, Hk, S, Dv); key head h / (H / Hk) serves query head h. Strides are arbitrary except that rows
// are contiguous. Elements beyond the lengths are never read. Work is cut into tiles of kKeys keys
// times kBlock rows, so memory is linear in T and S. float16 and bfloat16 are widened and computed
// in float, except that bfloat16 is multiplied as it is on processors with instructions for it that
// are faster. How the work is cut depends on the shapes only, never on the number of threads, and
// no sum is shared between tasks, so results are bit-equal from run to run.
#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>

#include "../attention_arguments.h"
#include "isa.h"

#define TFKERN_KERNEL "attention.inl"
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
void run_bias_backward(const AttentionBackward<C>& a, std::atomic<int64_t>& next) {
  TFKERN_ISA_CALL(attention_bias_backward, a, next);
}

template <class C>
int64_t dkv_width(const AttentionBackward<C>& a) {
  TFKERN_ISA_CALL(attention_dkv_width, a);
}

template <class C>
void store_dkv(const AttentionBackward<C>& a, const Document& document, int64_t hk, int64_t begin,
               int64_t count, C* sums, int64_t parts, int64_t distance) {
  TFKERN_ISA_CALL(attention_store_dkv, a, document, hk, begin, count, sums, parts, distance);
}

template <class C>
void transpose_keys(const AttentionScores<C>& a, const HeadView& x, int64_t N,
                    std::atomic<int64_t>& next) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<C, float>) avx512::attention_transpose(a, x, N, next);
#endif
}

// Calls `work` once per thread with a counter that hands out tasks: a thread that is free takes the
// next one.
template <class Work>
void run_tasks(const Work& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1,
                              [&](int64_t, int64_t) { work(next); });
}

// Switches to AMX if the processor has it and the tensors are bfloat16: transposes `x`, which has N
// features, for products that read it along the keys.
template <class C>
void prepare_amx(AttentionScores<C>& a, const HeadView& x, int64_t N, Scratch& scratch) {
  if (isa() != Isa::amx || a.q.dtype != Dtype::bf16) return;
  a.first_tile = {0};
  for (const Document& d : a.documents) {
    a.first_tile.push_back(a.first_tile.back() + a.Hk * a.tiles(d));
  }
  a.transposed = scratch.get<BFloat16>(a.first_tile.back() * kKeys * round_up(N, 16));
  run_tasks([&](std::atomic<int64_t>& next) { transpose_keys(a, x, N, next); });
}

// ---- arguments ----

template <class C>
constexpr ScalarType kCompute = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;

HeadView heads(const Tensor& t) {
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  return {data<char>(t), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes, dtype(t)};
}

ScoreTensor elements(const Optional& t) {
  if (!t) return {};
  int64_t strides[4] = {};
  for (int i = 0; i < 4; ++i) {
    if (t->size(i) != 1) strides[i] = t->stride(i) * static_cast<int64_t>(t->element_size());
  }
  const bool boolean = t->scalar_type() == ScalarType::Bool;
  return {data<const char>(*t),
          strides[0],
          strides[1],
          strides[2],
          strides[3],
          boolean ? Dtype::f32 : dtype(*t),
          boolean};
}

// The elements of a vector of integers, or of a matrix row by row.
std::vector<int64_t> integers(const Tensor& t) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  const int64_t dim = t.dim(), rows = dim == 2 ? t.size(0) : 1, columns = t.size(dim - 1);
  const int64_t row = dim == 2 ? t.stride(0) : 0, column = t.stride(dim - 1);
  std::vector<int64_t> result;
  result.reserve(rows * columns);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      const int64_t i = m * row + n * column;
      result.push_back(wide ? data<const int64_t>(t)[i] : data<const int32_t>(t)[i]);
    }
  }
  return result;
}

// The elements of a vector, or of a matrix row by row, in the computing type; empty if absent.
template <class C>
std::vector<C> parameters(const Optional& t) {
  if (!t) return {};
  const int64_t dim = t->dim(), columns = t->size(dim - 1);
  const int64_t row = dim == 2 ? t->stride(0) : 0, column = t->stride(dim - 1);
  std::vector<C> result(t->numel());
  for (int64_t i = 0; i < t->numel(); ++i) {
    const int64_t from = i / columns * row + i % columns * column;
    TFKERN_DTYPE(dtype(*t), baseline::convert(result.data() + i, data<const T>(*t) + from, 1));
  }
  return result;
}

// Lengths clamped to [0, limit]; B times `limit` if they are absent.
std::vector<int64_t> lengths(const Optional& t, int64_t B, int64_t limit) {
  if (!t) return std::vector<int64_t>(B, limit);
  std::vector<int64_t> result = integers(*t);
  for (int64_t& length : result) length = std::clamp<int64_t>(length, 0, limit);
  return result;
}

std::vector<Document> documents(const AttentionArguments& in, int64_t B, int64_t T, int64_t S) {
  std::vector<Document> result;
  if (!in.cu_seqlens_q) {
    const auto queries = lengths(in.query_lengths, B, T), keys = lengths(in.key_lengths, B, S);
    for (int64_t b = 0; b < B; ++b) result.push_back({b, 0, 0, queries[b], keys[b]});
    return result;
  }
  const auto queries = integers(*in.cu_seqlens_q), keys = integers(*in.cu_seqlens_k);
  int64_t query_end = 0, key_end = 0;
  for (size_t i = 0; i + 1 < queries.size(); ++i) {
    const int64_t query0 = std::clamp(queries[i], query_end, T);
    const int64_t key0 = std::clamp(keys[i], key_end, S);
    query_end = std::clamp(queries[i + 1], query0, T);
    key_end = std::clamp(keys[i + 1], key0, S);
    result.push_back({0, query0, key0, query_end - query0, key_end - key0});
  }
  return result;
}

AttentionShape shape(const AttentionArguments& in) {
  const int64_t B = in.q.size(0), T = in.q.size(2), S = in.S();
  const auto limit = [](std::optional<int64_t> x) {
    return std::clamp(x.value_or(kNoLimit), -kNoLimit, kNoLimit);
  };
  return {B,
          in.q.size(1),
          in.k.size(1),
          T,
          S,
          in.q.size(3),
          in.v.size(3),
          limit(in.left),
          limit(in.right),
          documents(in, B, T, S)};
}

// The arguments as the kernels see them, together with the memory that they point to.
template <class C>
struct BoundArguments {
  Tensor q, k, v;
  std::vector<C> alibi_slopes, sink;
  std::vector<int64_t> pages;

  explicit BoundArguments(const AttentionArguments& in)
      : q(with_contiguous_rows(in.q)),
        k(with_contiguous_rows(in.k)),
        v(with_contiguous_rows(in.v)),
        alibi_slopes(parameters<C>(in.alibi_slopes)),
        sink(parameters<C>(in.sink)) {
    if (!in.page_table) return;
    pages = integers(*in.page_table);
    // Entries beyond a length may hold anything.
    for (int64_t& page : pages) page = std::clamp<int64_t>(page, 0, in.k.size(0) - 1);
  }

  AttentionScores<C> scores(const AttentionArguments& in, AttentionShape shape) const {
    AttentionScores<C> a{std::move(shape)};
    a.scale = static_cast<C>(in.scale);
    a.softcap = static_cast<C>(in.softcap);
    a.q = heads(q);
    a.k = heads(k);
    a.v = heads(v);
    if (in.page_table) {
      for (HeadView* x : {&a.k, &a.v}) {
        x->pages = pages.data();
        x->pages_per_batch = in.pages();
        x->page_size = in.k.size(2);
      }
    }
    a.bias = elements(in.bias);
    a.mask = elements(in.mask);
    a.alibi_slopes = in.alibi_slopes ? alibi_slopes.data() : nullptr;
    a.sink = in.sink ? sink.data() : nullptr;
    a.drops = in.seed && in.dropout_p > 0;
    if (a.drops) {
      a.seed = static_cast<uint64_t>(*data<const int64_t>(*in.seed));
      a.dropout = Dropout<C>(in.dropout_p);
    }
    return a;
  }
};

// A new (B, heads, rows, size) tensor in the layout of x, which is such a tensor too: contiguous,
// or with rows before heads in memory if they are so in x. The latter is how projections give q, k
// and v, and need o and the gradients. tfkern/native/attention.py has the same rule.
Tensor empty_in_layout(const Tensor& x, int64_t rows, int64_t size) {
  const int64_t B = x.size(0), heads = x.size(1);
  if (x.stride(1) >= x.stride(2)) return empty(x, {B, heads, rows, size}, x.scalar_type());
  return torch::stable::transpose(empty(x, {B, rows, heads, size}, x.scalar_type()), 1, 2);
}

// Calls f(batch, begin, end) for the ranges of rows that belong to no document. `keys` tells
// whether rows are keys or queries.
template <class F>
void each_rest(const AttentionShape& a, bool keys, const F& f) {
  int64_t batch = 0, end = 0;  // all rows before row `end` of `batch` are done
  const int64_t rows = keys ? a.S : a.T;
  for (const Document& d : a.documents) {
    if (d.batch != batch) f(batch, end, rows), end = 0;
    batch = d.batch;
    f(batch, end, keys ? d.key0 : d.query0);
    end = keys ? d.key0 + d.keys : d.query0 + d.queries;
  }
  if (batch < a.B) f(batch, end, rows);
}

// Sets the rows of x that belong to no document to 0.
void zero_rest(const Tensor& x, const AttentionShape& a, bool keys) {
  const HeadView view = heads(x);
  const int64_t bytes = x.size(3) * size(view.dtype);
  each_rest(a, keys, [&](int64_t batch, int64_t begin, int64_t end) {
    for (int64_t h = 0; h < x.size(1); ++h) {
      char* head = view.data + batch * view.batch + h * view.head;
      for (int64_t i = begin; i < end; ++i) std::memset(head + i * view.row, 0, bytes);
    }
  });
}

// ---- operators ----

template <class C>
std::tuple<Tensor, Tensor> forward(const AttentionArguments& in) {
  AttentionShape sizes = shape(in);
  const BoundArguments<C> converted(in);
  AttentionForward<C> a{converted.scores(in, std::move(sizes))};
  Tensor o = empty_in_layout(in.q, a.T, a.Dv);
  Tensor lse = empty(in.q, {2, a.B, a.H, a.T}, kCompute<C>);
  a.o = heads(o);
  a.lse = static_cast<C*>(lse.data_ptr());
  a.lse_rest = a.lse + a.B * a.H * a.T;
  zero_rest(o, a, false);
  each_rest(a, false, [&](int64_t batch, int64_t begin, int64_t end) {
    for (int64_t row = batch * a.H * a.T; row < (batch + 1) * a.H * a.T; row += a.T) {
      for (int64_t i = row + begin; i < row + end; ++i) {
        a.lse[i] = -std::numeric_limits<C>::infinity();
        a.lse_rest[i] = 0;
      }
    }
  });
  // Parts are cut so that there are about 64 tasks. Only the shape counts, not the lengths of the
  // documents.
  const bool shared = a.group() * a.T <= kBlock;
  const int64_t blocks = a.B * a.Hk * (shared ? 1 : a.group() * ((a.T + kBlock - 1) / kBlock));
  a.part_keys = std::max<int64_t>(4, (blocks * a.S / 64 + kKeys - 1) / kKeys) * kKeys;
  a.first_task = {0};
  bool join = false;
  for (const Document& d : a.documents) {
    a.first_task.push_back(a.first_task.back() + a.Hk * a.blocks(d) * a.parts(d));
    join |= a.parts(d) > 1;
  }
  const int64_t tasks = a.first_task.back();
  Scratch scratch;
  if (join) a.partials = scratch.get<C>(tasks * a.partial_size());
  const auto finished = std::make_unique<std::atomic<int64_t>[]>(join ? tasks : 0);
  a.finished = finished.get();
  // Decoding has too few rows for AMX to pay.
  if (a.group() * a.T > kBlock / 8) prepare_amx(a, a.v, a.Dv, scratch);
  run_tasks([&](std::atomic<int64_t>& next) { run_forward(a, next); });
  return {o, lse};
}

template <class C>
InputGradients backward(const AttentionArguments& in, const AttentionGradients& g) {
  AttentionShape sizes = shape(in);
  const BoundArguments<C> converted(in);
  AttentionBackward<C> a{converted.scores(in, std::move(sizes))};
  const ScalarType type = in.q.scalar_type();
  Tensor dq = empty_in_layout(in.q, a.T, a.D), dk = empty_in_layout(in.k, a.S, a.D);
  Tensor dv = empty_in_layout(in.v, a.S, a.Dv);
  zero_rest(dq, a, false);
  zero_rest(dk, a, true);
  zero_rest(dv, a, true);
  a.d_o = heads(g.d_o);
  a.o = heads(g.o);
  a.dlse = g.dlse ? data<const C>(*g.dlse) : nullptr;
  a.lse = data<const C>(g.lse);
  a.lse_rest = a.lse + a.B * a.H * a.T;
  a.dq = heads(dq);
  a.dk = heads(dk);
  a.dv = heads(dv);
  for (const Document& d : a.documents) a.chunks = std::max(a.chunks, a.chunks_of(d));
  Scratch scratch;
  const int64_t width = dkv_width(a);
  if (a.chunks > 1) a.partials = scratch.get<C>(a.B * a.Hk * a.chunks * a.S * width);
  if (in.sink) a.sink_terms = scratch.get<C>(a.B * a.H * a.T);
  prepare_amx(a, a.k, a.D, scratch);
  run_tasks([&](std::atomic<int64_t>& next) { run_backward(a, next); });
  for (const Document& d : a.documents) {
    if (a.chunks_of(d) == 1) continue;
    torch::stable::parallel_for(0, a.Hk * d.keys, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin, count; i < end; i += count) {
        const int64_t hk = i / d.keys, s = i % d.keys;
        count = std::min(end - i, d.keys - s);
        C* sums = a.partials + a.partial_row(d, hk, 0) * width;
        store_dkv(a, d, hk, s, count, sums, a.chunks_of(d), a.S * width);
      }
    });
  }

  Tensor dbias = absent(in.q, type), dsink = absent(in.q, type);
  if (in.bias && g.bias_grad) {
    const std::array<int64_t, 4> sizes{in.bias->size(0), in.bias->size(1), in.bias->size(2),
                                       in.bias->size(3)};
    dbias = empty(in.q, {sizes[0], sizes[1], sizes[2], sizes[3]}, in.bias->scalar_type());
    a.dbias = {
        static_cast<char*>(dbias.data_ptr()), dtype(dbias), sizes[0], sizes[1], sizes[2], sizes[3]};
    run_tasks([&](std::atomic<int64_t>& next) { run_bias_backward(a, next); });
  }
  if (in.sink) {
    dsink = empty(in.q, {a.H}, in.sink->scalar_type());
    for (int64_t h = 0; h < a.H; ++h) {
      double sum = 0;
      for (const Document& d : a.documents) {
        const C* terms = a.sink_terms + a.row_index(d, h, 0);
        for (int64_t t = 0; t < d.queries; ++t) sum += terms[t];
      }
      const C total = static_cast<C>(sum);
      TFKERN_DTYPE(dtype(dsink),
                   baseline::convert(static_cast<T*>(dsink.data_ptr()) + h, &total, 1));
    }
  }
  return {dq, dk, dv, dbias, dsink};
}

bool wide(const AttentionArguments& in) { return in.q.scalar_type() == ScalarType::Double; }

std::tuple<Tensor, Tensor> forward_as_wide(const AttentionArguments& in) {
  return (wide(in) ? forward<double> : forward<float>)(in);
}

InputGradients backward_as_wide(const AttentionArguments& in, const AttentionGradients& g) {
  return (wide(in) ? backward<double> : backward<float>)(in, g);
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) {
  m.impl("attention_forward", &tfkern::attention_forward<tfkern::forward_as_wide>);
  m.impl("attention_backward", &tfkern::attention_backward<tfkern::backward_as_wide>);
}
