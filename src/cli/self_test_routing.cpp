// Self-tests of the gate, the router with its balance loss, and the way of the tokens to their
// experts and back.
#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros_like.h>

#include "cli/self_test.h"
#include "ops/gate.h"
#include "ops/permute.h"
#include "ops/router.h"

namespace dsv3::cli {
namespace {

constexpr int64_t kTokens = 38, kExperts = 16, kChoices = 3, kHidden = 40, kSequences = 2;

at::Tensor leaf64(const at::Tensor& host) {
  return host.clone().requires_grad_(true);
}

SelfTestPairs test_route(SelfTestSetup& setup) {
  const ops::RouterOptions options{.num_experts = kExperts,
                                   .num_experts_per_token = kChoices,
                                   .n_group = 4,
                                   .topk_group = 2,
                                   .scale = 2.5};
  const at::Tensor logits = setup.normal({kTokens, kExperts});
  // Negative biases tell a group masked with -inf from one masked with zero.
  const at::Tensor bias = setup.normal({kExperts}).sub(1.0).to(at::kFloat);
  const at::Tensor logits_got = setup.place(logits), logits_expected = leaf64(logits);
  const ops::Routing got = ops::route(logits_got, setup.move(bias), options, {kSequences, {}});
  const ops::Routing expected =
      ops::reference::route(logits_expected, bias.to(at::kDouble), options, {kSequences, {}});
  const at::Tensor upstream = setup.normal({kTokens, kChoices});
  const auto objective = [&](const ops::Routing& routing) {
    return (routing.weights * upstream.to(routing.weights.options())).sum() + routing.balance_loss;
  };
  objective(got).backward();
  objective(expected).backward();
  return {{got.experts, expected.experts},
          {got.weights, expected.weights},
          {got.scores, expected.scores},
          {got.counts, expected.counts},
          {got.balance_loss, expected.balance_loss},
          {logits_got.grad(), logits_expected.grad()}};
}

/// x in `dtype`, the weight in FP32 as the router's is.
SelfTestPairs test_gate(SelfTestSetup& setup) {
  const at::Tensor x = setup.normal({kTokens, kHidden});
  const at::Tensor weight = setup.normal({kExperts, kHidden}).to(at::kFloat);
  const at::Tensor x_got = setup.place(x), x_expected = leaf64(x);
  const auto weight_of = [](const at::Tensor& value) {
    return ops::Weight{value.detach().clone().requires_grad_(true), at::zeros_like(value)};
  };
  const ops::Weight w_got = weight_of(setup.move(weight));
  const ops::Weight w_expected = weight_of(weight.to(at::kDouble));
  const at::Tensor got = ops::gate({x_got, {}}, w_got);
  const at::Tensor expected = ops::gate({x_expected, {}}, w_expected);
  const at::Tensor upstream = setup.normal({kTokens, kExperts});
  got.backward(upstream.to(setup.device, at::kFloat));
  expected.backward(upstream);
  return {{got, expected}, {x_got.grad(), x_expected.grad()}, {w_got.grad, w_expected.grad}};
}

/// Tokens to experts in a fixed pattern that leaves some experts empty and repeats none within a
/// token.
at::Tensor choices(SelfTestSetup& setup) {
  at::Tensor first = setup.integers({kTokens, 1}, static_cast<int32_t>(kExperts) / 2);
  at::Tensor experts = first.repeat({1, kChoices});
  for (int64_t k = 1; k < kChoices; ++k) experts.select(1, k).add_(k);
  return experts;
}

SelfTestPairs test_permutation(SelfTestSetup& setup) {
  const at::Tensor experts = choices(setup);
  SelfTestPairs pairs;
  for (const int64_t multiple : {1, 8}) {
    const auto got = ops::make_permutation(setup.move(experts), kExperts, multiple);
    const auto expected = ops::reference::make_permutation(experts, kExperts, multiple);
    pairs.emplace_back(got.counts, expected.counts);
    pairs.emplace_back(got.offsets, expected.offsets);
    pairs.emplace_back(got.row_of, expected.row_of);
    pairs.emplace_back(got.choice_of, expected.choice_of);
  }
  return pairs;
}

SelfTestPairs test_permute(SelfTestSetup& setup) {
  const at::Tensor experts = choices(setup), x = setup.normal({kTokens, kHidden});
  const at::Tensor x_got = setup.place(x), x_expected = leaf64(x);
  const at::Tensor got = ops::permute(x_got, ops::make_permutation(setup.move(experts), kExperts));
  const at::Tensor expected =
      ops::reference::permute(x_expected, ops::reference::make_permutation(experts, kExperts));
  const at::Tensor upstream = setup.normal({kTokens * kChoices, kHidden});
  got.backward(upstream.to(setup.device, setup.dtype));
  expected.backward(upstream);
  return {{got, expected}, {x_got.grad(), x_expected.grad()}};
}

SelfTestPairs test_combine(SelfTestSetup& setup) {
  const at::Tensor experts = choices(setup), rows = setup.normal({kTokens * kChoices, kHidden});
  const at::Tensor weights = setup.normal({kTokens, kChoices}),
                   base = setup.normal({kTokens, kHidden});
  const at::Tensor rows_got = setup.place(rows), rows_expected = leaf64(rows);
  const at::Tensor base_got = setup.place(base), base_expected = leaf64(base);
  const at::Tensor weights_expected = leaf64(weights);
  const at::Tensor weights_got = weights.to(setup.device, at::kFloat).clone().requires_grad_(true);
  const at::Tensor got = ops::combine(
      rows_got, weights_got, ops::make_permutation(setup.move(experts), kExperts), base_got);
  const at::Tensor expected =
      ops::reference::combine(rows_expected, weights_expected,
                              ops::reference::make_permutation(experts, kExperts), base_expected);
  const at::Tensor upstream = setup.normal({kTokens, kHidden});
  got.backward(upstream.to(setup.device, setup.dtype));
  expected.backward(upstream);
  return {{got, expected},
          {rows_got.grad(), rows_expected.grad()},
          {weights_got.grad(), weights_expected.grad()},
          {base_got.grad(), base_expected.grad()}};
}

}  // namespace

std::vector<SelfTest> routing_self_tests() {
  return {{"route", test_route, true},
          {"gate", test_gate},
          {"make_permutation", test_permutation, true},
          {"permute", test_permute},
          {"combine", test_combine}};
}

}  // namespace dsv3::cli
