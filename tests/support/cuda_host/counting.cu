// Operators that show how attention's kernels find their tiles, so that tests can check sizes far
// too large to compute attention for.
#include "attention_bias.h"

namespace tfkern::cuda {
namespace {

// Returns (tiles, 2): the document of each tile and the tile's index within it, or -1 if there is
// none.
Tensor packed_tiles(Tensor cu_seqlens, int64_t rows, int64_t size, bool of_keys) {
  Attention a{};
  a.documents = static_cast<int>(cu_seqlens.numel()) - 1;
  a.T = a.S = static_cast<int>(rows);
  a.cu_seqlens_q = a.cu_seqlens_k = {cu_seqlens.data_ptr(), 0, 1, Dtype::f32, true};
  const int64_t tiles = most_tiles(a, of_keys, static_cast<int>(size));
  Tensor out = empty(cu_seqlens, {tiles, 2}, ScalarType::Long);
  for (int64_t i = 0; i < tiles; ++i) {
    Document d;
    int tile;
    const bool found = find_tile(a, i, of_keys, static_cast<int>(size), d, tile);
    auto* pair = static_cast<int64_t*>(out.data_ptr()) + 2 * i;
    pair[0] = found ? d.number : -1;
    pair[1] = found ? tile : -1;
  }
  return out;
}

BiasTiles bias_tiles(const Tensor& scores, const Tensor& bias, int64_t rows, int64_t keys) {
  const auto* sizes = static_cast<const int64_t*>(scores.data_ptr());
  const auto* of_bias = static_cast<const int64_t*>(bias.data_ptr());
  Attention a{};
  a.B = static_cast<int>(sizes[0]);
  a.H = static_cast<int>(sizes[1]);
  a.T = static_cast<int>(sizes[2]);
  a.S = static_cast<int>(sizes[3]);
  return BiasTiles(a, {of_bias[0], of_bias[1], of_bias[2], of_bias[3]}, static_cast<int>(rows),
                   static_cast<int>(keys));
}

// Returns the numbers of tiles of dbias, terms of a tile, parts of a tile, and terms of a part.
Tensor bias_counts(Tensor scores, Tensor bias, int64_t rows, int64_t keys) {
  const BiasTiles a = bias_tiles(scores, bias, rows, keys);
  Tensor out = empty(scores, {4}, ScalarType::Long);
  const int64_t counts[] = {a.tiles(), a.terms(), a.parts, a.part_terms};
  std::copy(counts, counts + 4, static_cast<int64_t*>(out.data_ptr()));
  return out;
}

// Returns batch, head, tile of queries and tile of keys of a term.
Tensor bias_term(Tensor scores, Tensor bias, int64_t rows, int64_t keys, int64_t tile,
                 int64_t term) {
  const BiasTiles a = bias_tiles(scores, bias, rows, keys);
  const BiasTile x = a.term(a.tile(tile), term);
  Tensor out = empty(scores, {4}, ScalarType::Long);
  const int64_t place[] = {x.b, x.h, x.t, x.s};
  std::copy(place, place + 4, static_cast<int64_t*>(out.data_ptr()));
  return out;
}

}  // namespace
}  // namespace tfkern::cuda

STABLE_TORCH_LIBRARY(tfkern_counting, m) {
  m.def("packed_tiles(Tensor cu_seqlens, int rows, int size, bool of_keys) -> Tensor");
  m.def("bias_counts(Tensor scores, Tensor bias, int rows, int keys) -> Tensor");
  m.def("bias_term(Tensor scores, Tensor bias, int rows, int keys, int tile, int term) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tfkern_counting, CPU, m) {
  m.impl("packed_tiles", TORCH_BOX(&tfkern::cuda::packed_tiles));
  m.impl("bias_counts", TORCH_BOX(&tfkern::cuda::bias_counts));
  m.impl("bias_term", TORCH_BOX(&tfkern::cuda::bias_term));
}
