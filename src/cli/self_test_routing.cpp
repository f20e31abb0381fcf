// Self-tests of the router, its balance loss, and the way of the tokens to their experts and back.
#include "cli/self_test.h"
#include "ops/permute.h"
#include "ops/router.h"

namespace dsv3::cli {
namespace {

constexpr int64_t kTokens = 37, kExperts = 16, kChoices = 3, kHidden = 40;

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
  const ops::Routing got = ops::route(logits_got, setup.move(bias), options);
  const ops::Routing expected =
      ops::reference::route(logits_expected, bias.to(at::kDouble), options);
  const at::Tensor upstream = setup.normal({kTokens, kChoices});
  got.weights.backward(upstream.to(setup.device, at::kFloat));
  expected.weights.backward(upstream);
  return {{got.experts, expected.experts},
          {got.weights, expected.weights},
          {got.scores, expected.scores},
          {logits_got.grad(), logits_expected.grad()}};
}

SelfTestPairs test_sequence_balance_loss(SelfTestSetup& setup) {
  const at::Tensor scores =
      setup.normal({kTokens, kExperts}).sigmoid().to(setup.dtype).to(at::kDouble);
  const at::Tensor got_scores = setup.place(scores), expected_scores = leaf64(scores);
  const at::Tensor got = ops::sequence_balance_loss(got_scores, {}, 1, kChoices);
  const at::Tensor expected =
      ops::reference::sequence_balance_loss(expected_scores, {}, 1, kChoices);
  got.backward();
  expected.backward();
  return {{got, expected}, {got_scores.grad(), expected_scores.grad()}};
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
  const ops::Permutation got = ops::make_permutation(setup.move(experts), kExperts);
  const ops::Permutation expected = ops::reference::make_permutation(experts, kExperts);
  return {{got.counts, expected.counts},
          {got.offsets, expected.offsets},
          {got.row_of, expected.row_of},
          {got.choice_of, expected.choice_of}};
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
          {"sequence_balance_loss", test_sequence_balance_loss, true},
          {"make_permutation", test_permutation, true},
          {"permute", test_permute},
          {"combine", test_combine}};
}

}  // namespace dsv3::cli
