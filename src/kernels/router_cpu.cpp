// Router on the host: chunks of tokens are shared between threads, affinities of a row in one
// vector loop, then its selection by insertion into a list of K. Chunks' sums and counts are joined
// in order. Technical report §2.1.2.

#include "kernels/detail/cpu.h"
#include "kernels/detail/lanes.h"
#include "kernels/detail/router.h"
#include "kernels/detail/top_k.h"
#include "kernels/routing.h"

namespace dsv3::kernels {

void check_router_shape(const RouterShape& s) {
  require(s.num_experts >= 1 && s.num_experts <= kMaxExperts,
          "[route] num_experts: expected 1 to {}, got {}", kMaxExperts, s.num_experts);
  require(s.n_group >= 1 && s.n_group <= kMaxGroups && s.num_experts % s.n_group == 0,
          "[route] n_group: expected 1 to {} and a divisor of num_experts {}, got {}", kMaxGroups,
          s.num_experts, s.n_group);
  require(s.topk_group >= 1 && s.topk_group <= s.n_group,
          "[route] topk_group: expected 1 to n_group {}, got {}", s.n_group, s.topk_group);
  const int32_t most = std::min(kMaxChoices, s.topk_group * (s.num_experts / s.n_group));
  require(s.num_experts_per_token >= 1 && s.num_experts_per_token <= most,
          "[route] num_experts_per_token: expected 1 to {} (the experts in topk_group groups, at "
          "most {}), got {}",
          most, kMaxChoices, s.num_experts_per_token);
}

int64_t route_workspace(int64_t num_tokens, int64_t num_sequences, int32_t num_experts) {
  if (num_tokens == 0) return 0;
  const auto chunks = detail::router_chunks(num_tokens, num_sequences);
  const int64_t words =
      chunks.count * (3 * int64_t{num_experts} + 1) + num_sequences + 1;  // detail::RouterPartials
  return words * int64_t{sizeof(float)};
}

void detail::check_route(const RouteForward& p) {
  check_router_shape(p.shape);
  require(p.num_sequences >= 1 && p.num_tokens % p.num_sequences == 0,
          "[route] num_sequences: expected a divisor of the {} tokens, got {}", p.num_tokens,
          p.num_sequences);
  require(p.num_tokens == 0 || p.workspace != nullptr,
          "[route] workspace: expected route_workspace() bytes, got null");
  require((p.coefficients == nullptr) == (p.loss == nullptr),
          "[route] coefficients and loss: expected both or neither");
}

namespace cpu {
namespace {

using namespace detail;
using kernels::detail::RouterChunks;
using kernels::detail::RouterPartials;

DSV3_INLINE void softmax_row(float* s, int32_t size) {
  const float largest = max_row(s, size);
  for (int32_t e = 0; e < size; ++e) s[e] = exp_fast(s[e] - largest);
  const float inverse = 1.0f / sum_row(s, size);
  for (int32_t e = 0; e < size; ++e) s[e] *= inverse;
}

/// The sum of a group's two best, or its best; NaN counts as -inf.
DSV3_INLINE float group_score(const float* biased, int32_t size, bool top2) {
  float best = -__builtin_inff(), second = best;
  for (int32_t e = 0; e < size; ++e) {
    const float x = biased[e];
    const float lower = x > best ? best : x;
    second = lower > second ? lower : second;
    best = x > best ? x : best;
  }
  return top2 && size > 1 ? best + second : best;
}

/// Writes -inf over the groups that are not among the topk_group best.
DSV3_INLINE void limit_to_groups(const RouterShape& shape, float* biased) {
  const int32_t size = shape.num_experts / shape.n_group;
  float group_scores[kMaxGroups], top[kMaxGroups];
  int32_t ids[kMaxGroups];
  bool chosen[kMaxGroups] = {};
  for (int32_t g = 0; g < shape.n_group; ++g) {
    group_scores[g] = group_score(biased + g * size, size, shape.group_score_top2);
  }
  select_top(group_scores, shape.n_group, shape.topk_group, ids, top);
  for (int32_t i = 0; i < shape.topk_group; ++i) chosen[ids[i]] = true;
  for (int32_t g = 0; g < shape.n_group; ++g) {
    if (!chosen[g]) std::fill_n(biased + g * size, size, -__builtin_inff());
  }
}

DSV3_INLINE void choose(const RouterShape& shape, const float* scores, const float* bias,
                        int32_t* experts, float* weights) {
  float biased[kMaxExperts], top[kMaxChoices];
  const float* selection = scores;
  if (bias != nullptr || shape.topk_group < shape.n_group) {
    for (int32_t e = 0; e < shape.num_experts; ++e) {
      biased[e] = bias == nullptr ? scores[e] : scores[e] + bias[e];
    }
    if (shape.topk_group < shape.n_group) limit_to_groups(shape, biased);
    selection = biased;
  }
  select_top(selection, shape.num_experts, shape.num_experts_per_token, experts, top);
  float sum = 0.0f;
  for (int32_t k = 0; k < shape.num_experts_per_token; ++k) sum += scores[experts[k]];
  const float divisor = shape.normalize ? sum + 1e-20f : 1.0f;
  for (int32_t k = 0; k < shape.num_experts_per_token; ++k) {
    weights[k] = scores[experts[k]] / divisor * shape.scale;
  }
}

/// Sums and counts of one chunk, to be copied to its place in the scratch.
struct ChunkTotals {
  float sums[kMaxExperts] = {};
  int32_t raw[kMaxExperts] = {};
  int32_t chosen[kMaxExperts] = {};
  int32_t valid = 0;
};

/// The token's share of the balance loss and its raw choices.
DSV3_INLINE void add_balance(const RouterShape& shape, const float* scores, const int32_t* chosen,
                             bool raw_is_chosen, ChunkTotals& totals) {
  const int64_t num_experts = shape.num_experts;
  ++totals.valid;
  const float inverse = 1.0f / (sum_row(scores, num_experts) + 1e-20f);
  for (int64_t e = 0; e < num_experts; ++e) totals.sums[e] += scores[e] * inverse;
  int32_t ids[kMaxChoices];
  float top[kMaxChoices];
  if (!raw_is_chosen) {
    select_top(scores, shape.num_experts, shape.num_experts_per_token, ids, top);
    chosen = ids;
  }
  for (int32_t k = 0; k < shape.num_experts_per_token; ++k) ++totals.raw[chosen[k]];
}

DSV3_CLONES void route_chunk(const RouteForward& p, const RouterChunks& chunks,
                             const RouterPartials& partials, int64_t index) {
  const int64_t num_experts = p.shape.num_experts, num_choices = p.shape.num_experts_per_token;
  const int64_t begin = index % chunks.per_sequence * chunks.tokens;
  const int64_t end = std::min(chunks.sequence_length, begin + chunks.tokens);
  const bool raw_is_chosen = p.bias == nullptr && p.shape.topk_group == p.shape.n_group;
  ChunkTotals totals;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t token = index / chunks.per_sequence * chunks.sequence_length + t;
    const float* const __restrict logits = p.logits + token * num_experts;
    float* const __restrict scores = p.scores + token * num_experts;
    if (p.shape.sigmoid) {
      for (int64_t e = 0; e < num_experts; ++e) {
        scores[e] = 1.0f / (1.0f + exp_fast(-logits[e]));
      }
    } else {
      std::copy_n(logits, num_experts, scores);
      softmax_row(scores, p.shape.num_experts);
    }
    int32_t* const experts = p.experts + token * num_choices;
    choose(p.shape, scores, p.bias, experts, p.weights + token * num_choices);
    for (int64_t k = 0; k < num_choices; ++k) ++totals.chosen[experts[k]];
    if (p.coefficients != nullptr && (p.valid == nullptr || p.valid[token])) {
      add_balance(p.shape, scores, experts, raw_is_chosen, totals);
    }
  }
  std::copy_n(totals.sums, num_experts, partials.sums + index * num_experts);
  std::copy_n(totals.raw, num_experts, partials.raw + index * num_experts);
  std::copy_n(totals.chosen, num_experts, partials.chosen + index * num_experts);
  partials.valid[index] = totals.valid;
}

/// Coefficients and loss of one sequence.
double finish_sequence(const RouteForward& p, const RouterChunks& chunks,
                       const RouterPartials& partials, int64_t sequence) {
  const int64_t first = sequence * chunks.per_sequence, end = first + chunks.per_sequence;
  int64_t num_valid = 0;
  for (int64_t c = first; c < end; ++c) num_valid += partials.valid[c];
  double loss = 0.0;
  for (int64_t e = 0; e < p.shape.num_experts; ++e) {
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t c = first; c < end; ++c) {
      sum += partials.sums[c * p.shape.num_experts + e];
      count += partials.raw[c * p.shape.num_experts + e];
    }
    const float coefficient = kernels::detail::balance_coefficient(
        p.shape.num_experts, p.shape.num_experts_per_token, count, num_valid);
    p.coefficients[sequence * p.shape.num_experts + e] = coefficient;
    loss += coefficient * sum;
  }
  return loss;
}

void finish_route(const RouteForward& p, const RouterChunks& chunks,
                  const RouterPartials& partials) {
  if (p.counts != nullptr) {
    std::fill_n(p.counts, p.shape.num_experts, 0);
    for (int64_t i = 0; i < chunks.count * p.shape.num_experts; ++i) {
      p.counts[i % p.shape.num_experts] += partials.chosen[i];
    }
  }
  if (p.coefficients == nullptr) return;
  double loss = 0.0;
  for (int64_t b = 0; b < p.num_sequences; ++b) loss += finish_sequence(p, chunks, partials, b);
  *p.loss = static_cast<float>(loss);
}

/// ds[chosen] += the gradient of the weights with respect to the unbiased scores.
DSV3_INLINE void add_weight_gradient(const RouterShape& shape, const int32_t* experts,
                                     const float* scores, const float* dweights, float* ds) {
  float sum = 1e-20f, dot = 0.0f;
  for (int32_t k = 0; k < shape.num_experts_per_token; ++k) {
    sum += scores[experts[k]];
    dot += dweights[k] * scores[experts[k]];
  }
  for (int32_t k = 0; k < shape.num_experts_per_token; ++k) {
    const float d = shape.normalize ? (dweights[k] - dot / sum) / sum : dweights[k];
    ds[experts[k]] += shape.scale * d;
  }
}

/// ds += dloss · (c - Σ c s / Σ s) / Σ s.
DSV3_INLINE void add_loss_gradient(const float* c, const float* s, int64_t num_experts, float dloss,
                                   float* ds) {
  const float total = sum_row(s, num_experts) + 1e-20f;
  const float mean = dot_rows(c, s, num_experts) / total;
  const float factor = dloss / total;
  for (int64_t e = 0; e < num_experts; ++e) ds[e] += factor * (c[e] - mean);
}

DSV3_CLONES void route_backward_rows(const RouteBackward& p, int64_t begin, int64_t end) {
  const int64_t num_experts = p.shape.num_experts, num_choices = p.shape.num_experts_per_token;
  const int64_t sequence_length = p.num_tokens / p.num_sequences;
  float ds[kMaxExperts];
  for (int64_t t = begin; t < end; ++t) {
    const float* const s = p.scores + t * num_experts;
    float* const dlogits = p.dlogits + t * num_experts;
    std::fill_n(ds, num_experts, 0.0f);
    if (p.dweights != nullptr) {
      add_weight_gradient(p.shape, p.experts + t * num_choices, s, p.dweights + t * num_choices,
                          ds);
    }
    if (p.coefficients != nullptr && (p.valid == nullptr || p.valid[t])) {
      add_loss_gradient(p.coefficients + t / sequence_length * num_experts, s, num_experts,
                        *p.dloss, ds);
    }
    if (p.shape.sigmoid) {
      for (int64_t e = 0; e < num_experts; ++e) dlogits[e] = ds[e] * s[e] * (1.0f - s[e]);
    } else {
      const float dot = dot_rows(ds, s, num_experts);
      for (int64_t e = 0; e < num_experts; ++e) dlogits[e] = s[e] * (ds[e] - dot);
    }
  }
}

}  // namespace

void route_forward(const RouteForward& p) {
  kernels::detail::check_route(p);
  if (p.num_tokens == 0) {
    const RouterChunks none{.sequence_length = 0, .tokens = 0, .per_sequence = 0, .count = 0};
    return finish_route(p, none, {});
  }
  const RouterChunks chunks = kernels::detail::router_chunks(p.num_tokens, p.num_sequences);
  const RouterPartials partials = kernels::detail::router_partials(p, chunks);
  parallel_rows(chunks.count, 32 * int64_t{chunks.tokens} * p.shape.num_experts,
                [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) route_chunk(p, chunks, partials, i);
                });
  finish_route(p, chunks, partials);
}

void route_backward(const RouteBackward& p) {
  check_router_shape(p.shape);
  parallel_rows(p.num_tokens, 16 * p.shape.num_experts,
                [&](int64_t begin, int64_t end) { route_backward_rows(p, begin, end); });
}

}  // namespace cpu
}  // namespace dsv3::kernels
