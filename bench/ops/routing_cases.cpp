// The gate's product, which experts a token goes to, and the loss that balances them.
#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "bench/ops/case.h"
#include "bench/ops/composed.h"
#include "kernels/routing.h"
#include "ops/gate.h"

namespace dsv3::bench {
namespace {

std::vector<std::pair<const char*, int64_t>> router_dims(const Problem& p) {
  return {{"T", p.tokens},
          {"E", p.shape.experts},
          {"K", p.shape.choices},
          {"n_group", p.shape.groups},
          {"topk_group", p.shape.topk_group}};
}

Plan plan_gate_forward(const Problem& p) {
  const int64_t T = p.tokens, D = p.shape.hidden, E = p.shape.experts;
  return {{{"T", T}, {"D", D}, {"E", E}}, T * D * p.element() + 4 * E * (D + T)};
}

/// x and dx, the weight and its bucket (read and written), dlogits.
Plan plan_gate_backward(const Problem& p) {
  const int64_t T = p.tokens, D = p.shape.hidden, E = p.shape.experts;
  return {{{"T", T}, {"D", D}, {"E", E}}, 2 * T * D * p.element() + 4 * E * (3 * D + T)};
}

Plan plan_route_forward(const Problem& p) {
  const int64_t T = p.tokens, E = p.shape.experts, K = p.shape.choices;
  return {router_dims(p), 4 * (2 * T * E + 2 * T * K + 2 * E)};
}

std::vector<std::pair<const char*, int64_t>> balance_dims(const Problem& p) {
  auto dims = router_dims(p);
  dims.emplace_back("B", p.num_sequences());
  return dims;
}

Plan plan_route_balance_forward(const Problem& p) {
  return {balance_dims(p), plan_route_forward(p).bytes + 4 * p.num_sequences() * p.shape.experts};
}

Plan plan_route_balance_backward(const Problem& p) {
  const int64_t T = p.tokens, E = p.shape.experts, K = p.shape.choices;
  return {balance_dims(p), 4 * (2 * T * E + 2 * T * K + p.num_sequences() * E)};
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

/// The sequence-wise loss of scores [B·S, E] (report eq. 17-20).
at::Tensor composed_balance(const at::Tensor& scores, int64_t B, int64_t K) {
  const int64_t E = scores.size(1), S = scores.size(0) / B;
  const at::Tensor top = std::get<1>(at::topk(scores.detach(), K));
  const at::Tensor chosen = at::zeros_like(scores).scatter_(1, top, 1.0);
  const at::Tensor f = chosen.view({B, S, E}).sum(1) * (static_cast<double>(E) / (K * S));
  const at::Tensor share = (scores / scores.sum(1, true)).view({B, S, E}).mean(1);
  return (f * share).sum();
}

/// {weights, loss}.
std::vector<at::Tensor> composed_route_balance(const at::Tensor& logits, const at::Tensor& bias,
                                               const Shape& s, int64_t B) {
  const auto routed = composed_route(logits, bias, s);
  return {routed[0], composed_balance(routed[1], B, s.choices)};
}

/// The product as the released model code writes it: both factors in FP32.
at::Tensor composed_gate(const at::Tensor& x, const at::Tensor& weight) {
  return x.to(at::kFloat).mm(weight.t());
}

struct GateInputs {
  at::Tensor x;  // [T, D]
  ops::Weight weight;
};

GateInputs make_gate_inputs(Setup& s) {
  const int64_t D = s.problem.shape.hidden, E = s.problem.shape.experts;
  return {s.normal({s.problem.tokens, D}),
          {s.normal32({E, D}, 0.006), s.zeros({E, D}, at::kFloat)}};
}

Work make_gate_forward(Setup& s) {
  const auto [x, weight] = make_gate_inputs(s);
  return {[x = x, weight = weight] {
            ops::gate({x, {}}, weight);
          },
          composed_forward([x = x, w = weight.value] { composed_gate(x, w); })};
}

Work make_gate_backward(Setup& s) {
  const auto [x, weight] = make_gate_inputs(s);
  const at::Tensor dy = s.normal32({s.problem.tokens, s.problem.shape.experts});
  const at::Tensor x_leaf = leaf(x), w_leaf = leaf(weight.value);
  return {[x = x, weight = weight, dy] { ops::gate_gradient(dy, x, weight, /*needs_dx=*/true); },
          composed_backward(
              [=]() -> std::vector<at::Tensor> { return {composed_gate(x_leaf, w_leaf)}; },
              {x_leaf, w_leaf}, {dy})};
}

/// route_forward's parameters; with a loss when `balance`.
kernels::RouteForward route_parameters(Setup& s, const at::Tensor& logits, const at::Tensor& bias,
                                       bool balance) {
  const int64_t T = s.problem.tokens, E = s.problem.shape.experts, K = s.problem.shape.choices;
  const int64_t B = balance ? s.problem.num_sequences() : 1;
  const int64_t workspace = kernels::route_workspace(T, B, static_cast<int32_t>(E));
  const auto floats = [&s](at::IntArrayRef sizes) {
    return s.empty(sizes, at::kFloat).mutable_data_ptr<float>();
  };
  return {.num_tokens = T,
          .num_sequences = B,
          .shape = router_shape(s.problem.shape),
          .logits = logits.const_data_ptr<float>(),
          .bias = bias.const_data_ptr<float>(),
          .experts = s.empty({T, K}, at::kInt).mutable_data_ptr<int32_t>(),
          .weights = floats({T, K}),
          .scores = floats({T, E}),
          .counts = s.empty({E}, at::kInt).mutable_data_ptr<int32_t>(),
          .valid = nullptr,
          .coefficients = balance ? floats({B, E}) : nullptr,
          .loss = balance ? floats({1}) : nullptr,
          .workspace = s.empty({workspace}, at::kByte).mutable_data_ptr()};
}

Work make_route_forward(Setup& s) {
  const auto& shape = s.problem.shape;
  const at::Tensor logits = s.normal32({s.problem.tokens, shape.experts});
  const at::Tensor bias = s.normal32({shape.experts}, 0.1);
  const auto p = route_parameters(s, logits, bias, /*balance=*/false);
  return {[p, stream = s.stream()] { kernels::route_forward(p, stream); },
          composed_forward([=] { composed_route(logits, bias, shape); })};
}

Work make_route_balance_forward(Setup& s) {
  const auto& shape = s.problem.shape;
  const int64_t B = s.problem.num_sequences();
  const at::Tensor logits = s.normal32({s.problem.tokens, shape.experts});
  const at::Tensor bias = s.normal32({shape.experts}, 0.1);
  const auto p = route_parameters(s, logits, bias, /*balance=*/true);
  return {[p, stream = s.stream()] { kernels::route_forward(p, stream); },
          composed_forward([=] { composed_route_balance(logits, bias, shape, B); })};
}

Work make_route_balance_backward(Setup& s) {
  const auto& shape = s.problem.shape;
  const int64_t T = s.problem.tokens, E = shape.experts, K = shape.choices;
  const int64_t B = s.problem.num_sequences();
  const at::Tensor logits = s.normal32({T, E}), bias = s.normal32({E}, 0.1);
  const at::Tensor dweights = s.normal32({T, K}), coefficients = s.normal32({B, E});
  const at::Tensor scores = s.keep(at::sigmoid(logits)), experts = s.distinct_experts();
  const at::Tensor dloss = s.keep(at::full({}, 1e-4, scores.options()));
  const kernels::RouteBackward p{.num_tokens = T,
                                 .num_sequences = B,
                                 .shape = router_shape(shape),
                                 .experts = experts.const_data_ptr<int32_t>(),
                                 .scores = scores.const_data_ptr<float>(),
                                 .dweights = dweights.const_data_ptr<float>(),
                                 .valid = nullptr,
                                 .coefficients = coefficients.const_data_ptr<float>(),
                                 .dloss = dloss.const_data_ptr<float>(),
                                 .dlogits = s.empty({T, E}, at::kFloat).mutable_data_ptr<float>()};
  const at::Tensor input = leaf(logits);
  return {[p, stream = s.stream()] { kernels::route_backward(p, stream); },
          composed_backward([=] { return composed_route_balance(input, bias, shape, B); }, {input},
                            {dweights, dloss})};
}

constexpr Benchmark kBenchmarks[] = {
    {"gate_forward", "x times the gate's FP32 weight, FP32 accuracy", plan_gate_forward,
     make_gate_forward},
    {"gate_backward", "the gradients of x and, added to its bucket, of the weight",
     plan_gate_backward, make_gate_backward},
    {"route_forward", "scores, group-limited selection, weights and counts from FP32 logits",
     plan_route_forward, make_route_forward},
    {"route_balance_forward", "the same with the sequence-wise balance loss",
     plan_route_balance_forward, make_route_balance_forward},
    {"route_balance_backward", "the logits' gradient from the weights' and the loss's",
     plan_route_balance_backward, make_route_balance_backward},
};

}  // namespace

std::span<const Benchmark> routing_benchmarks() {
  return kBenchmarks;
}

}  // namespace dsv3::bench
