#pragma once

#include "kernels/detail/attention_body.h"

namespace dsv3::kernels::detail {
namespace {

/// Per thread: everything of one head's queries, packed once, and one tile's worth of keys.
template <Mode kMode>
struct BackwardScratch {
  static constexpr int64_t kPer = per_unit(kMode);
  int64_t q_blocks, qk_units, qk_lanes, v_units, v_lanes;
  // Per block of queries.
  uint32_t *q_vectors, *q_columns, *do_vectors, *do_columns;
  float *delta, *lse, *dq;
  // Per tile.
  uint32_t *rows, *k_rows, *k_columns, *v_rows, *p_rows, *ds_rows, *ds_columns;
  float *scores, *dp, *dk, *dv;
  int64_t bytes;

  BackwardScratch(const AttentionProblem& problem, char* base) {
    Arena arena{base};
    q_blocks = (problem.sequence_length + kTile - 1) / kTile;
    qk_units = packed_width<kMode>(problem.qk_head_dim);
    v_units = packed_width<kMode>(problem.v_head_dim);
    qk_lanes = round_up(problem.qk_head_dim, kLanes);
    v_lanes = round_up(problem.v_head_dim, kLanes);
    q_vectors = arena.take<uint32_t>(q_blocks * qk_units * kTile);
    q_columns = arena.take<uint32_t>(q_blocks * qk_lanes * kTile / kPer);
    do_vectors = arena.take<uint32_t>(q_blocks * v_units * kTile);
    do_columns = arena.take<uint32_t>(q_blocks * v_lanes * kTile / kPer);
    delta = arena.take<float>(q_blocks * kTile);
    lse = arena.take<float>(q_blocks * kTile);
    dq = arena.take<float>(q_blocks * qk_lanes * kTile);
    rows = arena.take<uint32_t>(kTile * (qk_units > v_units ? qk_units : v_units));
    k_rows = arena.take<uint32_t>(kTile * qk_units);
    k_columns = arena.take<uint32_t>(kTile / kPer * qk_lanes);
    v_rows = arena.take<uint32_t>(kTile * v_units);
    p_rows = arena.take<uint32_t>(kTile * kTile);
    ds_rows = arena.take<uint32_t>(kTile * kTile);
    ds_columns = arena.take<uint32_t>(kTile * kTile);
    scores = arena.take<float>(kTile * kTile);
    dp = arena.take<float>(kTile * kTile);
    dk = arena.take<float>(kTile * qk_lanes);
    dv = arena.take<float>(kTile * v_lanes);
    bytes = arena.used;
  }

  int64_t columns_offset(int64_t block, int64_t lanes) const {
    return block * lanes * kTile / kPer;
  }
};

/// delta[q] = Σ_d grad_out · out, and logsumexp in base 2; zeros behind the last query.
template <Mode kMode>
void query_sums(const AttentionBackward& b, const Head<kMode>& head, int64_t q_begin, float* delta,
                float* lse) {
  const int64_t dim = b.problem.v_head_dim;
  const Rows grad = head.output(b.grad_out, dim, q_begin);
  const Rows out = head.output(b.out, dim, q_begin);
  for (int64_t q = 0; q < kTile; ++q) {
    delta[q] = 0.0f;
    lse[q] = 0.0f;
    if (q >= grad.count) continue;
    Floats sum{};
    for (int64_t d = 0; d < dim; d += kLanes) {
      sum += load_elements<kMode>(grad.row(q), d, dim - d) *
             load_elements<kMode>(out.row(q), d, dim - d);
    }
    float total = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += sum[lane];
    delta[q] = total;
    lse[q] = b.logsumexp[head.lse_offset() + q_begin + q] * kLog2e;
  }
}

template <Mode kMode>
void pack_queries(const AttentionBackward& b, const Head<kMode>& head,
                  const BackwardScratch<kMode>& s) {
  const AttentionProblem& p = b.problem;
  for (int64_t block = 0; block < s.q_blocks; ++block) {
    const int64_t begin = block * kTile;
    const Rows q = head.q(begin);
    pack_rows<kMode>(q, s.rows);
    transpose_rows(s.rows, s.qk_units, s.q_vectors + block * s.qk_units * kTile);
    pack_columns<kMode>(q, s.q_columns + s.columns_offset(block, s.qk_lanes));
    const Rows grad = head.output(b.grad_out, p.v_head_dim, begin);
    pack_rows<kMode>(grad, s.rows);
    transpose_rows(s.rows, s.v_units, s.do_vectors + block * s.v_units * kTile);
    pack_columns<kMode>(grad, s.do_columns + s.columns_offset(block, s.v_lanes));
    query_sums<kMode>(b, head, begin, s.delta + begin, s.lse + begin);
  }
}

/// P = exp(scale · S - logsumexp) and dS = P ∘ (dP - delta) · scale, in the layouts of the
/// products.
template <Mode kMode>
void score_gradients(const AttentionProblem& p, const BackwardScratch<kMode>& s, int64_t q_begin) {
  const Floats factor = splat(p.scale * kLog2e);
  for (int64_t n = 0; n < kTile; n += kLanes) {
    const Floats lse = load(s.lse + q_begin + n);
    const Floats delta = load(s.delta + q_begin + n);
    for (int64_t key = 0; key < kTile; key += 2) {
      Floats ds[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t at = (key + i) * kTile + n;
        const Floats x = exp2_negative(load(s.scores + at) * factor - lse);
        store_row<kMode>(s.p_rows, key + i, n, x);
        ds[i] = x > 0.0f ? x * (load(s.dp + at) - delta) * p.scale : Floats{};
        store_row<kMode>(s.ds_rows, key + i, n, ds[i]);
      }
      if constexpr (kMode == Mode::kPairs) store_columns<kMode>(s.ds_columns, key, n, ds[0], ds[1]);
    }
  }
}

/// out [kTile keys][lanes] (+)= left · right over the tile's queries. On the diagonal the second
/// half of the keys meets only the second half of the queries.
template <Mode kMode>
void reduce_queries(const uint32_t* left, const uint32_t* right, int64_t lanes, bool diagonal,
                    float* out) {
  constexpr int64_t kSteps = kTile / per_unit(kMode);
  constexpr int64_t kHalf = kTile / 2;
  const Onto onto = diagonal ? Onto::kNothing : Onto::kSum;  // the diagonal comes first
  const int64_t first = diagonal ? kHalf : kTile;
  multiply<kMode>({left, kSteps, 1}, first, {right, lanes, 0, lanes / kLanes}, kSteps, out, lanes,
                  onto);
  if (!diagonal) return;
  multiply<kMode>({left + kHalf * kSteps + kSteps / 2, kSteps, 1}, kHalf,
                  {right + kSteps / 2 * lanes, lanes, 0, lanes / kLanes}, kSteps / 2,
                  out + kHalf * lanes, lanes, onto);
}

template <Mode kMode>
void backward_tile(const AttentionBackward& b, const Head<kMode>& head,
                   const BackwardScratch<kMode>& s, int64_t q_begin, int64_t k_begin,
                   const TileMask& mask) {
  const AttentionProblem& p = b.problem;
  const int64_t block = q_begin / kTile;
  key_query_product<kMode>(s.k_rows, s.qk_units, s.q_vectors + block * s.qk_units * kTile,
                           p.qk_head_dim, mask.diagonal, s.scores);
  key_query_product<kMode>(s.v_rows, s.v_units, s.do_vectors + block * s.v_units * kTile,
                           p.v_head_dim, mask.diagonal, s.dp);
  if (mask.diagonal || mask.documents) {
    apply_mask(s.scores, mask, head.documents(), q_begin, k_begin, p.sequence_length);
  }
  score_gradients<kMode>(p, s, q_begin);
  reduce_queries<kMode>(s.p_rows, s.do_columns + s.columns_offset(block, s.v_lanes), s.v_lanes,
                        mask.diagonal, s.dv);
  reduce_queries<kMode>(s.ds_rows, s.q_columns + s.columns_offset(block, s.qk_lanes), s.qk_lanes,
                        mask.diagonal, s.dk);
  reduce_keys<kMode>(s.k_columns, s.qk_lanes, p.qk_head_dim,
                     kMode == Mode::kPairs ? s.ds_columns : s.ds_rows, mask.diagonal,
                     s.dq + block * s.qk_lanes * kTile, Onto::kSum);
}

template <Mode kMode>
void write_rows(const float* tile, int64_t lanes, const Rows& out) {
  for (int64_t r = 0; r < out.count; ++r) {
    for (int64_t d = 0; d < out.dim; d += kLanes) {
      store_elements<kMode>(const_cast<char*>(out.row(r)), d, out.dim - d,
                            load(tile + r * lanes + d));
    }
  }
}

template <Mode kMode>
void backward_head(const AttentionBackward& b, const Head<kMode>& head,
                   const BackwardScratch<kMode>& s) {
  const AttentionProblem& p = b.problem;
  pack_queries<kMode>(b, head, s);
  for (int64_t i = 0; i < s.q_blocks * s.qk_lanes * kTile; i += kLanes) store(s.dq + i, Floats{});
  for (int64_t k_begin = 0; k_begin < p.sequence_length; k_begin += kTile) {
    pack_rows<kMode>(head.k(k_begin), s.k_rows);
    pack_columns<kMode>(head.k(k_begin), s.k_columns);
    pack_rows<kMode>(head.v(k_begin), s.v_rows);
    for (int64_t q_begin = k_begin; q_begin < p.sequence_length; q_begin += kTile) {
      const TileMask mask = tile_mask(head.documents(), q_begin, k_begin, p.sequence_length);
      if (!mask.skip) backward_tile<kMode>(b, head, s, q_begin, k_begin, mask);
    }
    write_rows<kMode>(s.dk, s.qk_lanes, head.output(b.grad_k, p.qk_head_dim, k_begin));
    write_rows<kMode>(s.dv, s.v_lanes, head.output(b.grad_v, p.v_head_dim, k_begin));
  }
  alignas(64) float ones[kTile];
  for (int64_t i = 0; i < kTile; i += kLanes) store(ones + i, splat(1.0f));
  for (int64_t block = 0; block < s.q_blocks; ++block) {
    write_transposed<kMode>(s.dq + block * s.qk_lanes * kTile, p.qk_head_dim, ones,
                            head.output(b.grad_q, p.qk_head_dim, block * kTile));
  }
}

template <Mode kMode>
void backward(const AttentionBackward& b) {
  const AttentionProblem& p = b.problem;
  const int64_t heads = p.num_sequences * p.num_heads;
  const int64_t bytes = BackwardScratch<kMode>(p, nullptr).bytes;
#pragma omp parallel if (heads * p.sequence_length > 256)
  {
    const BackwardScratch<kMode> scratch(p, aligned(b.scratch) + omp_get_thread_num() * bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < heads; ++index) {
      const Head<kMode> head{p, index / p.num_heads, index % p.num_heads};
      backward_head<kMode>(b, head, scratch);
    }
  }
}

template <Mode kMode>
int64_t scratch(const AttentionProblem& p) {
  const int64_t forward = ForwardScratch<kMode>(p, nullptr).bytes;
  const int64_t backward = BackwardScratch<kMode>(p, nullptr).bytes;
  return (forward > backward ? forward : backward) * omp_get_max_threads() + kAlignment;
}

}  // namespace
}  // namespace dsv3::kernels::detail
