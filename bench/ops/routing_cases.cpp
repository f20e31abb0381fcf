// Which experts a token goes to, and the loss that balances them.
#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "bench/ops/case.h"
#include "bench/ops/composed.h"
#include "kernels/routing.h"

namespace dsv3::bench {
namespace {

std::vector<std::pair<const char*, int64_t>> router_dims(const Problem& p) {
  return {{"T", p.tokens},
          {"E", p.shape.experts},
          {"K", p.shape.choices},
          {"n_group", p.shape.groups},
          {"topk_group", p.shape.topk_group}};
}

Plan plan_route_forward(const Problem& p) {
  const int64_t T = p.tokens, E = p.shape.experts, K = p.shape.choices;
  return {router_dims(p), 4 * (2 * T * E + 2 * T * K + E)};
}

Plan plan_route_backward(const Problem& p) {
  const int64_t T = p.tokens, E = p.shape.experts, K = p.shape.choices;
  return {router_dims(p), 4 * (3 * T * E + 2 * T * K)};
}

kernels::RouterShape router_shape(const Shape& s) {
  return {.num_experts = static_cast<int32_t>(s.experts),
          .num_experts_per_token = static_cast<int32_t>(s.choices),
          .n_group = static_cast<int32_t>(s.groups),
          .topk_group = static_cast<int32_t>(s.topk_group),
          .sigmoid = true,
          .group_score_top2 = true,
          .normalize = true,
          .scale = static_cast<float>(s.scale)};
}

/// {weights, scores}: the router as the released model code writes it.
std::vector<at::Tensor> composed_route(const at::Tensor& logits, const at::Tensor& bias,
                                       const Shape& s) {
  const at::Tensor scores = at::sigmoid(logits);
  at::Tensor biased = scores.detach() + bias;
  if (s.groups > 1) {
    const at::Tensor groups = biased.view({-1, s.groups, s.experts / s.groups});
    const at::Tensor best = std::get<0>(at::topk(groups, 2)).sum(-1);
    const at::Tensor chosen = std::get<1>(at::topk(best, s.topk_group, -1, true, false));
    const at::Tensor others = at::ones_like(best, at::kBool).scatter_(1, chosen, false);
    biased = groups.masked_fill(others.unsqueeze(-1), -std::numeric_limits<double>::infinity())
                 .flatten(1);
  }
  const at::Tensor experts = std::get<1>(at::topk(biased, s.choices));
  const at::Tensor weights = scores.gather(1, experts);
  return {weights / (weights.sum(1, true) + 1e-20) * s.scale, scores};
}

Work make_route_forward(Setup& s) {
  const auto& shape = s.problem.shape;
  const int64_t T = s.problem.tokens, E = shape.experts, K = shape.choices;
  const at::Tensor logits = s.normal32({T, E}), bias = s.normal32({E}, 0.1);
  const kernels::RouteForward p{.num_tokens = T,
                                .shape = router_shape(shape),
                                .logits = logits.const_data_ptr<float>(),
                                .bias = bias.const_data_ptr<float>(),
                                .experts = s.empty({T, K}, at::kInt).mutable_data_ptr<int32_t>(),
                                .weights = s.empty({T, K}, at::kFloat).mutable_data_ptr<float>(),
                                .scores = s.empty({T, E}, at::kFloat).mutable_data_ptr<float>()};
  return {[p, stream = s.stream()] { kernels::route_forward(p, stream); },
          composed_forward([=] { composed_route(logits, bias, shape); })};
}

Work make_route_backward(Setup& s) {
  const auto& shape = s.problem.shape;
  const int64_t T = s.problem.tokens, E = shape.experts, K = shape.choices;
  const at::Tensor logits = s.normal32({T, E}), bias = s.normal32({E}, 0.1);
  const at::Tensor dweights = s.normal32({T, K}), dscores = s.normal32({T, E});
  const at::Tensor scores = s.keep(at::sigmoid(logits)), experts = s.distinct_experts();
  const kernels::RouteBackward p{.num_tokens = T,
                                 .shape = router_shape(shape),
                                 .experts = experts.const_data_ptr<int32_t>(),
                                 .scores = scores.const_data_ptr<float>(),
                                 .dweights = dweights.const_data_ptr<float>(),
                                 .dscores = dscores.const_data_ptr<float>(),
                                 .dlogits = s.empty({T, E}, at::kFloat).mutable_data_ptr<float>()};
  const at::Tensor input = leaf(logits);
  return {[p, stream = s.stream()] { kernels::route_backward(p, stream); },
          composed_backward([=] { return composed_route(input, bias, shape); }, {input},
                            {dweights, dscores})};
}

std::vector<std::pair<const char*, int64_t>> balance_dims(const Problem& p) {
  return {{"B", p.num_sequences()},
          {"S", p.sequence()},
          {"E", p.shape.experts},
          {"K", p.shape.choices}};
}

Plan plan_balance_forward(const Problem& p) {
  return {balance_dims(p), 4 * p.shape.experts * (p.tokens + p.num_sequences()) + 4};
}

Plan plan_balance_backward(const Problem& p) {
  return {balance_dims(p), 4 * p.shape.experts * (2 * p.tokens + p.num_sequences()) + 4};
}

/// The sequence-wise loss of scores [B·S, E] (report eq. 17-20).
at::Tensor composed_balance(const at::Tensor& scores, int64_t B, int64_t K) {
  const int64_t E = scores.size(1), S = scores.size(0) / B;
  const at::Tensor top = std::get<1>(at::topk(scores.detach(), K));
  const at::Tensor chosen = at::zeros_like(scores).scatter_(1, top, 1.0);
  const at::Tensor f = chosen.view({B, S, E}).sum(1) * (static_cast<double>(E) / (K * S));
  const at::Tensor share = (scores / scores.sum(1, true)).view({B, S, E}).mean(1);
  return (f * share).sum();
}

Work make_balance_forward(Setup& s) {
  const int64_t B = s.problem.num_sequences(), S = s.problem.sequence();
  const int64_t E = s.problem.shape.experts, K = s.problem.shape.choices;
  const at::Tensor scores = s.keep(at::sigmoid(s.normal32({B * S, E})));
  const int64_t workspace = kernels::sequence_balance_workspace(B, S, static_cast<int32_t>(E));
  const kernels::SequenceBalanceForward p{
      .num_sequences = B,
      .sequence_length = S,
      .num_experts = static_cast<int32_t>(E),
      .num_experts_per_token = static_cast<int32_t>(K),
      .scores = scores.const_data_ptr<float>(),
      .valid = nullptr,
      .coefficients = s.empty({B, E}, at::kFloat).mutable_data_ptr<float>(),
      .loss = s.empty({1}, at::kFloat).mutable_data_ptr<float>(),
      .workspace = s.empty({workspace}, at::kByte).mutable_data_ptr()};
  return {[p, stream = s.stream()] { kernels::sequence_balance_forward(p, stream); },
          composed_forward([=] { composed_balance(scores, B, K); })};
}

Work make_balance_backward(Setup& s) {
  const int64_t B = s.problem.num_sequences(), S = s.problem.sequence();
  const int64_t E = s.problem.shape.experts, K = s.problem.shape.choices;
  const at::Tensor scores = s.keep(at::sigmoid(s.normal32({B * S, E})));
  const at::Tensor coefficients = s.normal32({B, E});
  const at::Tensor dloss = s.keep(at::full({}, 1e-4, scores.options()));
  const kernels::SequenceBalanceBackward p{
      .num_sequences = B,
      .sequence_length = S,
      .num_experts = static_cast<int32_t>(E),
      .scores = scores.const_data_ptr<float>(),
      .valid = nullptr,
      .coefficients = coefficients.const_data_ptr<float>(),
      .dloss = dloss.const_data_ptr<float>(),
      .dscores = s.empty({B * S, E}, at::kFloat).mutable_data_ptr<float>()};
  const at::Tensor input = leaf(scores);
  return {[p, stream = s.stream()] { kernels::sequence_balance_backward(p, stream); },
          composed_backward(
              [=]() -> std::vector<at::Tensor> { return {composed_balance(input, B, K)}; }, {input},
              {dloss})};
}

constexpr Benchmark kBenchmarks[] = {
    {"route_forward", "scores, group-limited selection and weights from FP32 logits",
     plan_route_forward, make_route_forward},
    {"route_backward", "the logits' gradient from the weights' and the scores'",
     plan_route_backward, make_route_backward},
    {"sequence_balance_forward", "sequence-wise balance loss and its coefficients",
     plan_balance_forward, make_balance_forward},
    {"sequence_balance_backward", "the scores' gradient", plan_balance_backward,
     make_balance_backward},
};

}  // namespace

std::span<const Benchmark> routing_benchmarks() {
  return kBenchmarks;
}

}  // namespace dsv3::bench
