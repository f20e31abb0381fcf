// Router on the host: tokens are shared between threads, affinities of a block of rows in one
// vector loop, then each row's selection by insertion into a list of K. Technical report §2.1.2.

#include "kernels/detail/cpu.h"
#include "kernels/detail/lanes.h"
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

namespace cpu {
namespace {

using namespace detail;

DSV3_INLINE void softmax_row(float* s, int32_t size) {
  const float largest = max_row(s, size);
  for (int32_t e = 0; e < size; ++e) s[e] = exp_fast(s[e] - largest);
  const float inverse = 1.0f / sum_row(s, size);
  for (int32_t e = 0; e < size; ++e) s[e] *= inverse;
}

/// Writes -inf over the groups that are not among the topk_group best.
DSV3_INLINE void limit_to_groups(const RouterShape& shape, float* biased) {
  const int32_t size = shape.num_experts / shape.n_group;
  float group_scores[kMaxGroups], top[kMaxGroups];
  int32_t ids[kMaxGroups];
  bool chosen[kMaxGroups] = {};
  for (int32_t g = 0; g < shape.n_group; ++g) {
    float best[2];
    int32_t best_ids[2];
    const int32_t count = shape.group_score_top2 ? std::min(2, size) : 1;
    select_top(biased + g * size, size, count, best_ids, best);
    group_scores[g] = count == 2 ? best[0] + best[1] : best[0];
  }
  select_top(group_scores, shape.n_group, shape.topk_group, ids, top);
  for (int32_t i = 0; i < shape.topk_group; ++i) chosen[ids[i]] = true;
  for (int32_t e = 0; e < shape.num_experts; ++e) {
    if (!chosen[e / size]) biased[e] = -__builtin_inff();
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

DSV3_CLONES void route_rows(const RouteForward& p, int64_t begin, int64_t end) {
  const int64_t num_experts = p.shape.num_experts, num_choices = p.shape.num_experts_per_token;
  const float* const logits = p.logits;
  float* const scores = p.scores;
  if (p.shape.sigmoid) {
    for (int64_t i = begin * num_experts; i < end * num_experts; ++i) {
      scores[i] = 1.0f / (1.0f + exp_fast(-logits[i]));
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    float* const row = scores + t * num_experts;
    if (!p.shape.sigmoid) {
      std::copy_n(logits + t * num_experts, num_experts, row);
      softmax_row(row, p.shape.num_experts);
    }
    choose(p.shape, row, p.bias, p.experts + t * num_choices, p.weights + t * num_choices);
  }
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

DSV3_CLONES void route_backward_rows(const RouteBackward& p, int64_t begin, int64_t end) {
  const int64_t num_experts = p.shape.num_experts, num_choices = p.shape.num_experts_per_token;
  float ds[kMaxExperts];
  for (int64_t t = begin; t < end; ++t) {
    const float* const s = p.scores + t * num_experts;
    float* const dlogits = p.dlogits + t * num_experts;
    if (p.dscores == nullptr) {
      std::fill_n(ds, num_experts, 0.0f);
    } else {
      std::copy_n(p.dscores + t * num_experts, num_experts, ds);
    }
    if (p.dweights != nullptr) {
      add_weight_gradient(p.shape, p.experts + t * num_choices, s, p.dweights + t * num_choices,
                          ds);
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
  check_router_shape(p.shape);
  parallel_rows(p.num_tokens, 32 * p.shape.num_experts,
                [&](int64_t begin, int64_t end) { route_rows(p, begin, end); });
}

void route_backward(const RouteBackward& p) {
  check_router_shape(p.shape);
  parallel_rows(p.num_tokens, 16 * p.shape.num_experts,
                [&](int64_t begin, int64_t end) { route_backward_rows(p, begin, end); });
}

}  // namespace cpu
}  // namespace dsv3::kernels
