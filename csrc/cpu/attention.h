// The arguments of the kernels of attention.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "../dropout.h"
#include "../dtype.h"
#include "scratch.h"

namespace tfkern {

constexpr int64_t kBlock = 64;                  // rows of a tile, along the lanes
constexpr int64_t kKeys = 64;                   // keys of a tile
constexpr int64_t kBiasKeys = 8 * kKeys;        // keys of a tile of dbias
constexpr int64_t kNoLimit = int64_t{1} << 40;  // more than any row, key or distance

template <class C>
constexpr C kLog2E = C(1.4426950408889634);

// A (batch, head, row, feature) tensor of any element type; strides are in bytes. With a table of
// pages, `batch` is the distance from one page to the next.
struct HeadView {
  char* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  Dtype dtype = Dtype::f32;
  const int64_t* pages = nullptr;
  int64_t pages_per_batch = 0, page_size = 0;
};

// A (batch, head, query, key) tensor beside the scores; strides are in bytes, 0 where it is
// broadcast.
struct ScoreTensor {
  const char* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;
  Dtype dtype = Dtype::f32;
  bool boolean = false;
};

// The queries and keys of one batch, or of one document of a packed batch.
struct Document {
  int64_t batch;
  int64_t query0, key0;   // first row of the queries and of the keys within the batch
  int64_t queries, keys;  // number of queries and of keys
};

struct AttentionShape {
  int64_t B, H, Hk, T, S, D, Dv;
  int64_t left, right;  // query t sees the keys from t + offset - left to t + offset + right
  std::vector<Document> documents;

  int64_t group() const { return Hk ? H / Hk : 0; }
  // Tells whether the query heads of a key head share a block of rows.
  bool shared(const Document& d) const { return group() * d.queries <= kBlock; }
  // The number of blocks of rows of a key head.
  int64_t blocks(const Document& d) const {
    if (d.queries == 0 || H == 0) return 0;
    return shared(d) ? 1 : group() * ((d.queries + kBlock - 1) / kBlock);
  }
  // The number of tiles of keys.
  int64_t tiles(const Document& d) const { return (d.keys + kKeys - 1) / kKeys; }
  // The number of keys of the longest document.
  int64_t longest() const {
    int64_t keys = 0;
    for (const Document& d : documents) keys = std::max(keys, d.keys);
    return keys;
  }
  // The index of (document, head, query) in the contiguous (B, H, T) arrays lse, lse_rest, dlse and
  // sink_terms.
  int64_t row_index(const Document& d, int64_t h, int64_t t) const {
    return (d.batch * H + h) * T + d.query0 + t;
  }
};

// The arguments that define the scores.
template <class C>
struct AttentionScores : AttentionShape {
  C scale, softcap;
  HeadView q, k, v;
  ScoreTensor bias, mask;
  const C *alibi_slopes, *sink;  // (documents, H) and (H,); null if absent
  bool drops;                    // dropout is applied; else seed and dropout are unused
  uint64_t seed;
  Dropout<C> dropout;

  // Only on AMX: transposed tiles of v in forward, of k in backward. first_tile has the index of
  // each document's first tile, followed by the number of all tiles.
  std::vector<int64_t> first_tile;
  BFloat16* transposed = nullptr;  // null without AMX

  const BFloat16* transposed_tile(int64_t document, int64_t hk, int64_t s0, int64_t N) const {
    const int64_t tile = first_tile[document] + hk * this->tiles(this->documents[document]);
    return transposed + (tile + s0 / kKeys) * kKeys * round_up(N, 16);
  }
};

template <class C>
struct AttentionForward : AttentionScores<C> {
  HeadView o;
  C *lse, *lse_rest;  // log-sum-exp rounded, and what the rounding left out
  // If there are few rows and many keys, the keys are cut into parts, so that every thread has
  // work.
  int64_t part_keys;                // keys of a part
  std::vector<int64_t> first_task;  // first task of each document, then the number of all tasks
  C* partials;                      // results of tasks, needed if a block has several parts
  std::atomic<int64_t>* finished;   // finished[t]: parts done of the block whose first task is t

  int64_t parts(const Document& d) const {
    return std::max<int64_t>(1, (d.keys + part_keys - 1) / part_keys);
  }
  // The number of elements of one task's results.
  int64_t partial_size() const { return (round_up(this->Dv, 16) + 2) * kBlock; }
};

// The contiguous (B, H, T, S) gradient of a bias; sizes are 1 where bias is broadcast.
struct BiasGradient {
  char* data;
  Dtype dtype;
  int64_t B, H, T, S;
};

template <class C>
struct AttentionBackward : AttentionScores<C> {
  HeadView d_o, o;
  const C *dlse, *lse, *lse_rest;  // dlse may be null
  HeadView dq, dk, dv;
  BiasGradient dbias;
  C* sink_terms;   // terms of dsink, one for each row; null without a sink
  int64_t chunks;  // the most tasks that a key head has
  C* partials;     // sums of dk and dv of each task, needed if a key head has several

  // The number of tasks that share a key head: several if there are few heads, so that every thread
  // has work.
  int64_t chunks_of(const Document& d) const {
    const int64_t key_heads = static_cast<int64_t>(this->documents.size()) * this->Hk;
    return std::clamp<int64_t>(8 / std::max<int64_t>(key_heads, 1), 1,
                               std::max<int64_t>(this->blocks(d) / 2, 1));
  }
  // The row of `partials` with the sums for the first key of a document.
  int64_t partial_row(const Document& d, int64_t hk, int64_t chunk) const {
    return ((d.batch * this->Hk + hk) * chunks + chunk) * this->S + d.key0;
  }
};

// Takes the next task. The relaxed order suffices, because `next` publishes no other memory to
// other threads; `finished` does.
inline int64_t take(std::atomic<int64_t>& next) {
  return next.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace tfkern
