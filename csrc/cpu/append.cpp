// Keys and values of new tokens, written behind those that a cache holds (tfkern.nn.KVCache).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../tensor.h"

namespace tfkern {
namespace {

// The strides, in bytes, of a (B, H, T, D) tensor whose last axis is contiguous.
struct Rows {
  char* data;
  int64_t H, bytes;  // heads; bytes of a row
  int64_t batch, head, token;

  explicit Rows(const Tensor& t) : data(tfkern::data<char>(t)), H(t.size(1)) {
    const int64_t size = static_cast<int64_t>(t.element_size());
    bytes = t.size(3) * size;
    batch = t.stride(0) * size;
    head = t.stride(1) * size;
    token = t.stride(2) * size;
  }
  char* at(int64_t b, int64_t h, int64_t t) const {
    return data + b * batch + h * head + t * token;
  }
};

void check(const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths, const Tensor& k,
           const Tensor& v, const Optional& counts) {
  check_memory(k_cache, v_cache, lengths, k, v, counts);
  check_floating(k_cache, v_cache, k, v);
  STD_TORCH_CHECK(k_cache.dim() == 4 && k.dim() == 4,
                  "tfkern::append_: expected k and its cache (B, H, T, D)");
  const int64_t B = k_cache.size(0), S = k_cache.size(2), T = k.size(2);
  STD_TORCH_CHECK(T <= S, "tfkern::append_: expected no more tokens than the cache has room for");
  const auto fits = [&](const Tensor& x, const Tensor& cache) {
    return x.dim() == 4 && cache.dim() == 4 && x.size(0) == B && cache.size(0) == B &&
           x.size(1) == k.size(1) && cache.size(1) == k.size(1) && x.size(2) == T &&
           cache.size(2) == S && x.size(3) == cache.size(3) &&
           x.scalar_type() == cache.scalar_type() && (cache.size(3) <= 1 || cache.stride(3) == 1);
  };
  STD_TORCH_CHECK(fits(k, k_cache) && fits(v, v_cache),
                  "tfkern::append_: the tokens do not fit to the cache");
  STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Long && is_vector(lengths, B),
                  "tfkern::append_: expected an int64 length for each batch");
  STD_TORCH_CHECK(!counts || (counts->scalar_type() == ScalarType::Long && is_vector(*counts, B)),
                  "tfkern::append_: expected an int64 count for each batch");
  check_countable({kPadding, B, k.size(1), S, std::max(k.size(3), v.size(3))});
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(
        data<const int64_t>(lengths)[b] >= 0 && data<const int64_t>(lengths)[b] < INT64_MAX - S,
        "tfkern::append_: expected lengths of at least 0");
  }
}

// Token t of batch b goes to place (lengths[b] + t) mod S, for t < counts[b] (all T if absent);
// lengths grow by that. Returns how many places of each batch are in use.
Tensor append_(Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor k, Tensor v,
               Optional counts) {
  check(k_cache, v_cache, lengths, k, v, counts);
  const int64_t B = k.size(0), H = k.size(1), T = k.size(2), S = k_cache.size(2);
  const Tensor contiguous_k = with_contiguous_rows(k), contiguous_v = with_contiguous_rows(v);
  const Rows from[] = {Rows(contiguous_k), Rows(contiguous_v)};
  const Rows to[] = {Rows(k_cache), Rows(v_cache)};
  const Tensor used = empty(lengths, {B}, ScalarType::Long);
  int64_t* length = data<int64_t>(lengths);
  std::vector<int64_t> count(B, T);
  if (counts) {
    for (int64_t b = 0; b < B; ++b) {
      count[b] = std::clamp<int64_t>(data<const int64_t>(*counts)[b], 0, T);
    }
  }
  const int64_t bytes = std::max<int64_t>(1, T * (from[0].bytes + from[1].bytes));
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / bytes);
  torch::stable::parallel_for(0, B * H, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / H, h = i % H;
      for (int64_t t = 0; t < count[b]; ++t) {
        const int64_t place = (length[b] + t) % S;
        for (int n = 0; n < 2; ++n) {
          std::memmove(to[n].at(b, h, place), from[n].at(b, h, t), from[n].bytes);
        }
      }
    }
  });
  for (int64_t b = 0; b < B; ++b) {
    length[b] += count[b];
    data<int64_t>(used)[b] = std::min(length[b], S);
  }
  return used;
}

}  // namespace
}  // namespace tfkern

STABLE_TORCH_LIBRARY_IMPL(tfkern, CPU, m) { m.impl("append_", TORCH_BOX(&tfkern::append_)); }
