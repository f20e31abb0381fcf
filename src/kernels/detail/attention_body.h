#pragma once

// The host's attention over tiles of 64 queries × 64 keys, forward and backward.
//
// Scores are held transposed, [key][query], a vector along the queries: then the softmax over keys
// goes lane by lane, and the probabilities come out in the layout in which the next product reads
// them. A product's right operand is packed into vectors along queries (or along the head's dim);
// its left operand is read one unit at a time. Per tile: S = K·Qᵀ, O += Vᵀ·P; backward also dP =
// V·dOᵀ, dV += P·dO, dK += dS·Q, dQ += Kᵀ·dS.
//
// Every (sequence, head, block of queries) of the forward and every (sequence, head) of the
// backward is one task with a fixed order of sums, so the result does not depend on the number of
// threads.

#include <omp.h>

#include "kernels/attention.h"
#include "kernels/detail/attention_tile.h"

namespace dsv3::kernels::detail {
namespace {

constexpr int64_t kAlignment = 64;  // bytes, of every piece of scratch
constexpr float kLog2e = 1.44269504088896341f;
// Finite and far apart, so that a tile without any allowed key gives probabilities of zero and no
// NaN.
constexpr float kMasked = -1e30f;
constexpr float kLowestMaximum = -1e20f;

/// Hands out aligned pieces of scratch; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return p;
  }
};

inline char* aligned(void* p) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p));
  return static_cast<char*>(p) + (round_up(address, kAlignment) - address);
}

/// One head of one sequence.
template <Mode kMode>
struct Head {
  const AttentionProblem& p;
  int64_t sequence, head;

  Rows rows(const void* data, const AttentionStrides& strides, int64_t dim, int64_t begin) const {
    constexpr int64_t kSize = element_size(kMode);
    const int64_t token = sequence * p.sequence_length + begin;
    return {static_cast<const char*>(data) + (token * strides.token + head * strides.head) * kSize,
            strides.token * kSize, smaller(kTile, p.sequence_length - begin), dim};
  }
  Rows q(int64_t begin) const { return rows(p.q, p.q_strides, p.qk_head_dim, begin); }
  Rows k(int64_t begin) const { return rows(p.k, p.k_strides, p.qk_head_dim, begin); }
  Rows v(int64_t begin) const { return rows(p.v, p.v_strides, p.v_head_dim, begin); }
  Rows output(const void* data, int64_t dim, int64_t begin) const {
    return rows(data, {p.num_heads * dim, dim}, dim, begin);
  }
  const int32_t* documents() const {
    return p.documents == nullptr ? nullptr : p.documents + sequence * p.sequence_length;
  }
  int64_t lse_offset() const { return (sequence * p.num_heads + head) * p.sequence_length; }
};

/// What the mask does to a tile.
struct TileMask {
  bool skip = false;      // no pair of it may attend
  bool diagonal = false;  // keys after the query
  bool documents = false;
};

struct Range {
  int32_t low, high;
};

inline Range document_range(const int32_t* documents, int64_t begin, int64_t length) {
  Range range{documents[begin], documents[begin]};
  const int64_t end = smaller(begin + kTile, length);
  for (int64_t i = begin + 1; i < end; ++i) {
    if (documents[i] < range.low) range.low = documents[i];
    if (documents[i] > range.high) range.high = documents[i];
  }
  return range;
}

inline TileMask tile_mask(const int32_t* documents, int64_t q_begin, int64_t k_begin,
                          int64_t length) {
  TileMask mask;
  mask.diagonal = q_begin == k_begin;
  if (documents == nullptr) return mask;
  const Range q = document_range(documents, q_begin, length);
  const Range k = document_range(documents, k_begin, length);
  mask.skip = q.high < k.low || k.high < q.low;
  mask.documents = q.low != q.high || k.low != k.high;
  return mask;
}

template <int... kLane>
Ints lane_numbers(Sequence<kLane...>) {
  return Ints{kLane...};
}

/// Scores [key][query] of pairs that may not attend become kMasked.
inline void apply_mask(float* scores, const TileMask& mask, const int32_t* documents,
                       int64_t q_begin, int64_t k_begin, int64_t length) {
  const Ints lane = lane_numbers(LaneSequence{});
  alignas(64) int32_t q_documents[kTile] = {};
  if (mask.documents) {
    for (int64_t i = 0; i < smaller(kTile, length - q_begin); ++i) {
      q_documents[i] = documents[q_begin + i];
    }
  }
  for (int64_t key = 0; key < kTile; ++key) {
    const bool inside = mask.documents && k_begin + key < length;
    const int32_t k_document = inside ? documents[k_begin + key] : 0;
    for (int64_t n = 0; n < kTile; n += kLanes) {
      float* at = scores + key * kTile + n;
      Floats x = load(at);
      if (mask.diagonal) x = lane + static_cast<int32_t>(n - key) >= 0 ? x : splat(kMasked);
      if (inside) x = load(q_documents + n) == k_document ? x : splat(kMasked);
      store(at, x);
    }
  }
}

/// S = K·Qᵀ (or V·dOᵀ) of a tile: `left` [kTile][width] rows of keys, `right` [units][kTile]. On
/// the diagonal, vectors whose queries all come before a strip of keys are left out.
template <Mode kMode>
void key_query_product(const uint32_t* left, int64_t width, const uint32_t* right, int64_t dim,
                       bool diagonal, float* out) {
  const int64_t steps = (dim + per_unit(kMode) - 1) / per_unit(kMode);
  if (!diagonal) {
    multiply<kMode>({left, width, 1}, kTile, {right, kTile, 0, kTileVectors}, steps, out, kTile,
                    Onto::kNothing);
    return;
  }
  constexpr int64_t kStrip = 16;
  for (int64_t key = 0; key < kTile; key += kStrip) {
    multiply<kMode>({left + key * width, width, 1}, kStrip,
                    {right, kTile, key / kLanes, kTileVectors}, steps, out + key * kTile, kTile,
                    Onto::kNothing);
  }
}

/// out [dim][kTile] (+)= leftᵀ · right over the tile's keys; `left` packed columns [keys][width],
/// `right` [keys][kTile]. On the diagonal the second half of the keys meets only the second half of
/// the queries.
template <Mode kMode>
void reduce_keys(const uint32_t* left, int64_t width, int64_t dim, const uint32_t* right,
                 bool diagonal, float* out, Onto onto, const float* decay = nullptr) {
  constexpr int64_t kSteps = kTile / per_unit(kMode);
  if (!diagonal) {
    multiply<kMode>({left, 1, width}, dim, {right, kTile, 0, kTileVectors}, kSteps, out, kTile,
                    onto, decay);
    return;
  }
  constexpr int64_t kHalf = kSteps / 2;
  multiply<kMode>({left, 1, width}, dim, {right, kTile, 0, kTileVectors}, kHalf, out, kTile, onto,
                  decay);
  multiply<kMode>({left + kHalf * width, 1, width}, dim,
                  {right + kHalf * kTile, kTile, kTileVectors / 2, kTileVectors}, kHalf, out, kTile,
                  Onto::kSum);
}

/// Two keys' vectors of queries as units for reduce_keys.
template <Mode kMode>
void store_columns(uint32_t* out, int64_t key, int64_t n, Floats first, Floats second) {
  if constexpr (kMode == Mode::kPairs) {
    store(out + key / 2 * kTile + n, to_bf16(first) | to_bf16(second) << 16);
  } else {
    store(reinterpret_cast<float*>(out) + key * kTile + n, first);
    store(reinterpret_cast<float*>(out) + (key + 1) * kTile + n, second);
  }
}

/// One key's vector of queries as units along the queries.
template <Mode kMode>
void store_row(uint32_t* out, int64_t key, int64_t n, Floats x) {
  if constexpr (kMode == Mode::kPairs) {
    store_elements<kMode>(out, key * kTile + n, kLanes, x);
  } else {
    store(reinterpret_cast<float*>(out) + key * kTile + n, x);
  }
}

/// [dim][kTile] → rows of the output, each query's lane times factor[query].
template <Mode kMode>
void write_transposed(const float* tile, int64_t dim, const float* factor, const Rows& out) {
  const int64_t padded = round_up(dim, kLanes);
  for (int64_t q = 0; q < out.count; q += kLanes) {
    for (int64_t d = 0; d < padded; d += kLanes) {
      alignas(64) float block[kLanes * kLanes];
      transpose_block(reinterpret_cast<const uint32_t*>(tile + d * kTile + q), kTile,
                      reinterpret_cast<uint32_t*>(block), kLanes);
      for (int64_t i = 0; i < smaller(kLanes, out.count - q); ++i) {
        store_elements<kMode>(const_cast<char*>(out.row(q + i)), d, dim - d,
                              load(block + i * kLanes) * factor[q + i]);
      }
    }
  }
}

template <Mode kMode>
struct ForwardScratch {
  uint32_t *rows, *q, *v, *p;
  float *scores, *sum, *out;
  int64_t bytes;

  ForwardScratch(const AttentionProblem& problem, char* base) {
    Arena arena{base};
    const int64_t width = packed_width<kMode>(problem.qk_head_dim);
    const int64_t v_width = round_up(problem.v_head_dim, kLanes);
    rows = arena.take<uint32_t>(kTile * width);
    q = arena.take<uint32_t>(width * kTile);
    v = arena.take<uint32_t>(kTile / per_unit(kMode) * v_width);
    p = arena.take<uint32_t>(kTile * kTile);
    scores = arena.take<float>(kTile * kTile);
    sum = arena.take<float>(kTile);
    out = arena.take<float>(v_width * kTile);
    bytes = arena.used;
  }
};

/// Running maximum (of scores · scale · log2 e) and sum per query.
struct Softmax {
  Floats maximum[kTileVectors];
  Floats total[kTileVectors];
};

/// Turns a tile of scores into probabilities relative to the new maximum; decay[query] is what the
/// earlier ones must be multiplied by.
template <Mode kMode>
void softmax_tile(const float* scores, float scale, Softmax& state, float* decay, uint32_t* p) {
  const Floats factor = splat(scale * kLog2e);
  for (int64_t i = 0; i < kTileVectors; ++i) {
    const float* column = scores + i * kLanes;
    Floats a = load(column), b = load(column + kTile);
    for (int64_t key = 2; key < kTile; key += 2) {
      a = larger(a, load(column + key * kTile));
      b = larger(b, load(column + (key + 1) * kTile));
    }
    const Floats maximum = larger(state.maximum[i], larger(a, b) * factor);
    const Floats shrink = exp2_negative(state.maximum[i] - maximum);
    Floats even{}, odd{};
    for (int64_t key = 0; key < kTile; key += 2) {
      const Floats x = exp2_negative(load(column + key * kTile) * factor - maximum);
      const Floats y = exp2_negative(load(column + (key + 1) * kTile) * factor - maximum);
      even += x;
      odd += y;
      store_columns<kMode>(p, key, i * kLanes, x, y);
    }
    state.total[i] = state.total[i] * shrink + (even + odd);
    state.maximum[i] = maximum;
    store(decay + i * kLanes, shrink);
  }
}

template <Mode kMode>
void forward_block(const AttentionForward& f, const Head<kMode>& head, int64_t q_begin,
                   const ForwardScratch<kMode>& scratch) {
  const AttentionProblem& p = f.problem;
  const int64_t width = packed_width<kMode>(p.qk_head_dim);
  const int64_t v_width = round_up(p.v_head_dim, kLanes);
  pack_rows<kMode>(head.q(q_begin), scratch.rows);
  transpose_rows(scratch.rows, width, scratch.q);
  Softmax state;
  for (int64_t i = 0; i < kTileVectors; ++i) {
    state.maximum[i] = splat(kLowestMaximum);
    state.total[i] = Floats{};
  }
  Onto onto = Onto::kNothing;
  for (int64_t k_begin = 0; k_begin <= q_begin; k_begin += kTile) {
    const TileMask mask = tile_mask(head.documents(), q_begin, k_begin, p.sequence_length);
    if (mask.skip) continue;
    pack_rows<kMode>(head.k(k_begin), scratch.rows);
    pack_columns<kMode>(head.v(k_begin), scratch.v);
    key_query_product<kMode>(scratch.rows, width, scratch.q, p.qk_head_dim, mask.diagonal,
                             scratch.scores);
    if (mask.diagonal || mask.documents) {
      apply_mask(scratch.scores, mask, head.documents(), q_begin, k_begin, p.sequence_length);
    }
    softmax_tile<kMode>(scratch.scores, p.scale, state, scratch.sum, scratch.p);
    reduce_keys<kMode>(scratch.v, v_width, p.v_head_dim, scratch.p, mask.diagonal, scratch.out,
                       onto, scratch.sum);
    onto = Onto::kDecayed;
  }
  for (int64_t i = 0; i < kTileVectors; ++i) {
    store(scratch.sum + i * kLanes, 1.0f / state.total[i]);
  }
  write_transposed<kMode>(scratch.out, p.v_head_dim, scratch.sum,
                          head.output(f.out, p.v_head_dim, q_begin));
  if (f.logsumexp == nullptr) return;
  for (int64_t i = 0; i < smaller(kTile, p.sequence_length - q_begin); ++i) {
    f.logsumexp[head.lse_offset() + q_begin + i] =
        state.maximum[i / kLanes][i % kLanes] / kLog2e +
        __builtin_logf(state.total[i / kLanes][i % kLanes]);
  }
}

template <Mode kMode>
void forward(const AttentionForward& f) {
  const AttentionProblem& p = f.problem;
  const int64_t blocks = (p.sequence_length + kTile - 1) / kTile;
  const int64_t heads = p.num_sequences * p.num_heads;
  const int64_t bytes = ForwardScratch<kMode>(p, nullptr).bytes;
#pragma omp parallel if (heads * p.sequence_length > 256)
  {
    const ForwardScratch<kMode> scratch(p, aligned(f.scratch) + omp_get_thread_num() * bytes);
    // The longest rows first, so that the threads end together.
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < heads * blocks; ++task) {
      const int64_t block = blocks - 1 - task / heads;
      const int64_t index = task % heads;
      const Head<kMode> head{p, index / p.num_heads, index % p.num_heads};
      forward_block<kMode>(f, head, block * kTile, scratch);
    }
  }
}

}  // namespace
}  // namespace dsv3::kernels::detail
