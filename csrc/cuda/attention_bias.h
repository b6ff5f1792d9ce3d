// How the sums of dbias are cut into blocks.
//
// dbias is cut into tiles of queries by keys. A tile is a sum of terms, and each term comes from
// one tile of scores. Along a dimension that bias has (batch, head, queries, keys) a tile takes one
// place; along a dimension that bias is broadcast along, it takes all. There may be far too few
// tiles to fill a device: then several blocks share the terms of a tile, and their sums are added
// afterwards. The number of these parts follows from the shapes alone.
#pragma once

#include "attention.h"

namespace tfkern::cuda {

constexpr int64_t kBiasBlocks = 1024;  // blocks that are enough for any device
constexpr int64_t kBiasTerms = 8;      // the fewest terms that are worth a block

struct BiasTile {
  int b, h, t, s;  // batch, head, index of the tile of queries, index of the tile of keys
};

struct BiasTiles {
  int B, H, T, S;                  // the sizes of bias: 1 where it is broadcast
  int tiles_t, tiles_s;            // tiles of dbias along queries and keys
  int sum_b, sum_h, sum_t, sum_s;  // terms of a tile along each dimension
  int64_t parts, part_terms;       // blocks that share a tile, and terms of a block

  BiasTiles() = default;
  BiasTiles(const Attention& a, const int64_t (&sizes)[4], int rows, int keys)
      : B(static_cast<int>(sizes[0])),
        H(static_cast<int>(sizes[1])),
        T(static_cast<int>(sizes[2])),
        S(static_cast<int>(sizes[3])),
        tiles_t(tiles_of(T, rows)),
        tiles_s(tiles_of(S, keys)),
        sum_b(B == 1 ? a.B : 1),
        sum_h(H == 1 ? a.H : 1),
        sum_t(T == 1 ? tiles_of(a.T, rows) : 1),
        sum_s(S == 1 ? tiles_of(a.S, keys) : 1) {
    const int64_t most = std::max<int64_t>(1, kBiasBlocks / std::max<int64_t>(1, tiles()));
    part_terms = std::max(kBiasTerms, (terms() + most - 1) / most);
    parts = std::max<int64_t>(1, (terms() + part_terms - 1) / part_terms);
  }

  __host__ __device__ int64_t tiles() const { return int64_t{B} * H * tiles_t * tiles_s; }
  __host__ __device__ int64_t terms() const { return int64_t{sum_b} * sum_h * sum_t * sum_s; }

  __host__ __device__ BiasTile tile(int64_t i) const { return at(i, H, tiles_t, tiles_s); }
  // The tile of scores of term i of a tile. The terms of the same queries follow one another.
  __host__ __device__ BiasTile term(const BiasTile& tile, int64_t i) const {
    const BiasTile x = at(i, sum_h, sum_t, sum_s);
    return {tile.b + x.b, tile.h + x.h, tile.t + x.t, tile.s + x.s};
  }

 private:
  __host__ __device__ static BiasTile at(int64_t i, int h, int t, int s) {
    return {static_cast<int>(i / s / t / h), static_cast<int>(i / s / t % h),
            static_cast<int>(i / s % t), static_cast<int>(i % s)};
  }
};

}  // namespace tfkern::cuda
