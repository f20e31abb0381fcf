#include "ops/router.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <limits>
#include <set>

#include "support/compare.h"
#include "support/random.h"

namespace dsv3::ops {
namespace {

using test::close;
using test::same_bits;

class RouterTest : public testing::TestWithParam<at::Device> {};
INSTANTIATE_TEST_SUITE_P(Devices, RouterTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) {
                           return std::string(info.param.is_cuda() ? "cuda" : "cpu");
                         });

struct Case {
  int64_t num_tokens;
  RouterOptions options;
};

std::vector<Case> cases() {
  return {
      {1, {.num_experts = 1, .num_experts_per_token = 1}},
      {7, {.num_experts = 4, .num_experts_per_token = 2}},
      {33, {.num_experts = 8, .num_experts_per_token = 2, .normalize = false, .scale = 2.5}},
      {129, {.num_experts = 16, .num_experts_per_token = 16, .scale = 2.446}},
      {65, {.num_experts = 20, .num_experts_per_token = 3, .n_group = 5, .topk_group = 2}},
      {50, {.num_experts = 64, .num_experts_per_token = 6, .sigmoid = false, .normalize = false}},
      {40,
       {.num_experts = 160,
        .num_experts_per_token = 6,
        .n_group = 8,
        .topk_group = 3,
        .sigmoid = false,
        .group_score_top2 = false,
        .normalize = false,
        .scale = 16.0}},
      {100,
       {.num_experts = 256,
        .num_experts_per_token = 8,
        .n_group = 8,
        .topk_group = 4,
        .scale = 2.5}},
      {9, {.num_experts = 384, .num_experts_per_token = 8}},
      {70,
       {.num_experts = 256,
        .num_experts_per_token = 16,
        .n_group = 16,
        .topk_group = 5,
        .sigmoid = false,
        .group_score_top2 = false}},
      {45, {.num_experts = 37, .num_experts_per_token = 5}},
      {31, {.num_experts = 99, .num_experts_per_token = 7, .n_group = 9, .topk_group = 4}},
      {35, {.num_experts = 300, .num_experts_per_token = 16, .n_group = 3, .topk_group = 2}},
      {4500, {.num_experts = 64, .num_experts_per_token = 6, .n_group = 8, .topk_group = 3}},
      {8300, {.num_experts = 8, .num_experts_per_token = 2, .n_group = 2, .topk_group = 1}},
      {3, {.num_experts = 512, .num_experts_per_token = 16, .n_group = 64, .topk_group = 2}},
      {21, {.num_experts = 64, .num_experts_per_token = 4, .n_group = 64, .topk_group = 40}},
      {0, {.num_experts = 8, .num_experts_per_token = 2}},
  };
}

/// The selection of one token in plain loops: group scores, mask, then the best one by one.
template <typename T>
std::vector<int32_t> choose(const std::vector<T>& biased, const RouterOptions& options) {
  const auto size = static_cast<size_t>(options.num_experts / options.n_group);
  std::set<size_t> open_groups, chosen_groups;
  std::vector<T> group_scores;
  for (size_t g = 0; g < static_cast<size_t>(options.n_group); ++g) {
    std::vector<T> members(biased.begin() + static_cast<long>(g * size),
                           biased.begin() + static_cast<long>((g + 1) * size));
    std::sort(members.rbegin(), members.rend());
    group_scores.push_back(options.group_score_top2 && size > 1 ? members[0] + members[1]
                                                                : members[0]);
    open_groups.insert(g);
  }
  const auto best_of = [](const std::set<size_t>& ids, const std::vector<T>& scores) {
    size_t best = *ids.begin();
    for (const size_t id : ids) {
      if (scores[id] > scores[best]) best = id;
    }
    return best;
  };
  for (int64_t i = 0; i < options.topk_group; ++i) {
    const size_t best = best_of(open_groups, group_scores);
    open_groups.erase(best);
    chosen_groups.insert(best);
  }
  std::set<size_t> open;
  for (size_t e = 0; e < biased.size(); ++e) {
    if (chosen_groups.count(e / size) > 0) open.insert(e);
  }
  std::vector<int32_t> result;
  for (int64_t k = 0; k < options.num_experts_per_token; ++k) {
    const size_t best = best_of(open, biased);
    open.erase(best);
    result.push_back(static_cast<int32_t>(best));
  }
  return result;
}

/// Every token's choice must be what plain loops choose from the same scores and bias, and the
/// counts what they count.
template <typename T>
void expect_choices(const Routing& routing, const at::Tensor& bias, const RouterOptions& options) {
  const at::Tensor scores = routing.scores.detach().cpu(), experts = routing.experts.cpu();
  const at::Tensor b = bias.defined() ? bias.cpu() : bias, counts = routing.counts.cpu();
  const auto num_experts = static_cast<size_t>(options.num_experts);
  const auto num_choices = static_cast<size_t>(options.num_experts_per_token);
  std::vector<int32_t> expected_counts(num_experts);
  for (int64_t t = 0; t < scores.size(0); ++t) {
    const T* const row = scores.const_data_ptr<T>() + t * options.num_experts;
    std::vector<T> biased(row, row + num_experts);
    for (size_t e = 0; b.defined() && e < num_experts; ++e) biased[e] += b.const_data_ptr<T>()[e];
    const auto expected = choose(biased, options);
    for (size_t k = 0; k < num_choices; ++k) {
      const auto index = static_cast<size_t>(t) * num_choices + k;
      ASSERT_EQ(experts.const_data_ptr<int32_t>()[index], expected[k])
          << "token " << t << ", choice " << k;
      ++expected_counts[static_cast<size_t>(expected[k])];
    }
  }
  const auto* data = counts.const_data_ptr<int32_t>();
  EXPECT_EQ(std::vector<int32_t>(data, data + num_experts), expected_counts);
}

/// Scores and weights in float64, for the given choices.
std::pair<at::Tensor, at::Tensor> weights_of(const at::Tensor& logits, const at::Tensor& experts,
                                             const RouterOptions& options) {
  const at::Tensor scores = options.sigmoid ? at::sigmoid(logits) : at::softmax(logits, -1);
  at::Tensor weights = scores.gather(1, experts.to(logits.device(), at::kLong));
  if (options.normalize) weights = weights / (weights.sum(1, true) + 1e-20);
  return {scores, weights * options.scale};
}

/// 1 - s of a score near 1 is exact to 2^-24 only, in every FP32 router: that is the absolute part.
void expect_gradient(const at::Tensor& actual, const at::Tensor& expected) {
  const double size = expected.norm().item<double>();
  const double rounding = 1e-7 * static_cast<double>(expected.numel() + 1);
  EXPECT_LE((actual.to(at::kDouble) - expected).norm().item<double>(), 2e-6 * size + rounding)
      << test::worst_element(actual, expected);
}

TEST_P(RouterTest, ChoosesWeighsAndDifferentiatesAsPlainLoopsInFloat64) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [num_tokens, options] : cases()) {
    SCOPED_TRACE(testing::Message()
                 << "T " << num_tokens << ", E " << options.num_experts << ", K "
                 << options.num_experts_per_token << ", groups " << options.topk_group << " of "
                 << options.n_group << (options.sigmoid ? ", sigmoid" : ", softmax"));
    // Coarse logits tie often; negative biases are where a mask of 0 would win.
    at::Tensor logits =
        random.normal({num_tokens, options.num_experts}, at::kFloat, GetParam(), 2.0);
    logits = (logits * 4).round() / 4;
    const at::Tensor bias = random.normal({options.num_experts}, at::kFloat, GetParam(), 0.3, -2.0);
    logits.set_requires_grad(true);
    const Routing routing = route(logits, bias, options);
    expect_choices<float>(routing, bias, options);

    at::Tensor exact = logits.detach().to(at::kDouble).set_requires_grad(true);
    const auto [scores, weights] = weights_of(exact, routing.experts, options);
    EXPECT_TRUE(close(routing.scores, scores, 1e-6));
    EXPECT_TRUE(close(routing.weights, weights, 1e-6));

    const at::Tensor dweights = random.normal(weights.sizes(), at::kFloat, GetParam());
    (routing.weights * dweights).sum().backward();
    (weights * dweights).sum().backward();
    expect_gradient(logits.grad(), exact.grad());
  }
}

TEST_P(RouterTest, GradientAgreesWithFiniteDifferences) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const bool sigmoid : {true, false}) {
    const RouterOptions options{
        .num_experts = 12, .num_experts_per_token = 3, .sigmoid = sigmoid, .scale = 1.5};
    at::Tensor logits = random.normal({17, 12}, at::kFloat, GetParam()).set_requires_grad(true);
    const Routing routing = route(logits, {}, options);
    const at::Tensor d = random.normal({17, 3}, at::kDouble, GetParam());
    (routing.weights * d.to(at::kFloat)).sum().backward();
    // The choice stays what it was, so that no step crosses a tie.
    const at::Tensor direction = random.normal({17, 12}, at::kDouble, GetParam());
    const auto at_step = [&](double step) {
      const at::Tensor moved = logits.detach().to(at::kDouble) + direction * step;
      return (weights_of(moved, routing.experts, options).second * d.to(at::kFloat)).sum();
    };
    const double slope = (at_step(1e-6) - at_step(-1e-6)).item<double>() / 2e-6;
    const double got = (logits.grad().to(at::kDouble) * direction).sum().item<double>();
    EXPECT_NEAR(got, slope, 1e-4 * (1.0 + logits.grad().norm().item<double>()));
  }
}

TEST_P(RouterTest, ChoosesWithoutABias) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [num_tokens, options] : cases()) {
    at::Tensor logits = random.normal({num_tokens, options.num_experts}, at::kFloat, GetParam());
    logits = (logits * 4).round() / 4;
    expect_choices<float>(route(logits, {}, options), {}, options);
  }
}

TEST_P(RouterTest, AllTokensMayChooseTheSameExperts) {
  test::Random random(test::fresh_seed());
  const RouterOptions options{
      .num_experts = 256, .num_experts_per_token = 8, .n_group = 8, .topk_group = 4};
  const at::Tensor logits = random.normal({300, 256}, at::kFloat, GetParam());
  at::Tensor bias = at::zeros({256}, logits.options());
  for (int64_t k = 0; k < 8; ++k) bias[3 + 31 * (k / 2) + k] = 10.0 - static_cast<double>(k);
  const Routing routing = route(logits, bias, options);
  expect_choices<float>(routing, bias, options);
  EXPECT_EQ(routing.counts.max().item<int32_t>(), 300);
  EXPECT_EQ(routing.counts.gt(0).sum().item<int64_t>(), 8);
}

TEST_P(RouterTest, ReferenceChoosesAsPlainLoops) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [num_tokens, options] : cases()) {
    at::Tensor logits = random.normal({num_tokens, options.num_experts}, at::kDouble, GetParam());
    logits = (logits * 4).round() / 4;
    const at::Tensor bias =
        random.normal({options.num_experts}, at::kDouble, GetParam(), 0.3, -2.0);
    const Routing routing = route(logits, bias, options);
    EXPECT_EQ(routing.scores.scalar_type(), at::kDouble);
    expect_choices<double>(routing, bias, options);
    EXPECT_TRUE(close(routing.weights, weights_of(logits, routing.experts, options).second, 1e-14));
  }
}

TEST_P(RouterTest, TiesGoToTheLowerExpert) {
  const at::Tensor logits = at::zeros({5, 40}, at::TensorOptions(at::kFloat).device(GetParam()));
  const Routing routing = route(logits, {}, {.num_experts = 40, .num_experts_per_token = 4});
  for (int64_t k = 0; k < 4; ++k) EXPECT_EQ(routing.experts[4][k].item<int32_t>(), k);
  EXPECT_TRUE(close(routing.weights, at::full({5, 4}, 0.25), 1e-7));
}

TEST_P(RouterTest, TheBiasChoosesAndTheWeightStaysTheAffinity) {
  const auto float_options = at::TensorOptions(at::kFloat).device(GetParam());
  const at::Tensor logits = at::full({1, 8}, -30.0, float_options);
  at::Tensor bias = at::zeros({8}, float_options);
  bias[6] = 1e6;  // (s + b) - b would be 0
  const Routing routing =
      route(logits, bias, {.num_experts = 8, .num_experts_per_token = 1, .normalize = false});
  EXPECT_EQ(routing.experts[0][0].item<int32_t>(), 6);
  EXPECT_NEAR(routing.weights[0][0].item<float>() / 9.3576e-14, 1.0, 1e-4);
}

// NUMERICS trap 4: near 0 the 1e-20 is as large as the scores and decides the weights; where they
// vanish, it alone keeps 0/0 out of the weights and their gradient.
TEST_P(RouterTest, WeightsOfVanishingScoresAreNormalisedWith1e20) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const RouterOptions options{.num_experts = 8, .num_experts_per_token = 3, .scale = 2.5};
  for (const double level : {-44.0, -46.0, -60.0, -75.0, -200.0}) {
    SCOPED_TRACE(testing::Message() << "logits near " << level);
    at::Tensor logits = random.normal({9, 8}, at::kFloat, GetParam(), 0.5, level);
    logits.set_requires_grad(true);
    at::Tensor exact = logits.detach().to(at::kDouble).set_requires_grad(true);
    const Routing routing = route(logits, {}, options);
    const auto [scores, weights] = weights_of(exact, routing.experts, options);
    const double expected = weights.detach().abs().max().item<double>();
    EXPECT_LT(expected, level < -50 ? 1e-4 : 2.0);  // without the 1e-20 they sum to 2.5
    if (level > -80) {
      EXPECT_TRUE(close(routing.weights, weights, 1e-5));
    } else {
      EXPECT_EQ(routing.weights.abs().max().item<double>(), 0.0);
    }
    const at::Tensor dweights = random.normal(weights.sizes(), at::kFloat, GetParam());
    (routing.weights * dweights).sum().backward();
    (weights * dweights).sum().backward();
    const at::Tensor error = logits.grad().to(at::kDouble) - exact.grad();
    EXPECT_LE(error.norm().item<double>(), 1e-5 * exact.grad().norm().item<double>() + 1e-30)
        << test::worst_element(logits.grad(), exact.grad());
  }
}

TEST_P(RouterTest, UnchosenGroupsLoseEvenWhenEveryBiasIsNegative) {
  const auto float_options = at::TensorOptions(at::kFloat).device(GetParam());
  at::Tensor logits = at::zeros({1, 8}, float_options);
  logits[0][2] = 3.0;
  logits[0][3] = 2.0;
  const at::Tensor bias = at::full({8}, -5.0, float_options);
  const Routing routing = route(
      logits, bias, {.num_experts = 8, .num_experts_per_token = 2, .n_group = 4, .topk_group = 1});
  EXPECT_EQ(routing.experts[0][0].item<int32_t>(), 2);
  EXPECT_EQ(routing.experts[0][1].item<int32_t>(), 3);
}

TEST_P(RouterTest, NotANumberStillGivesExpertsInRange) {
  const at::Tensor logits = at::full({3, 16}, std::numeric_limits<double>::quiet_NaN(),
                                     at::TensorOptions(at::kFloat).device(GetParam()));
  const RouterOptions options{
      .num_experts = 16, .num_experts_per_token = 4, .n_group = 4, .topk_group = 2};
  const at::Tensor experts = route(logits, {}, options).experts.cpu();
  for (int64_t t = 0; t < 3; ++t) {
    std::set<int32_t> ids;
    for (int64_t k = 0; k < 4; ++k) ids.insert(experts[t][k].item<int32_t>());
    EXPECT_EQ(ids.size(), 4u);
    EXPECT_GE(*ids.begin(), 0);
    EXPECT_LT(*ids.rbegin(), 16);
  }
}

TEST_P(RouterTest, TenRunsGiveTheSameBits) {
  test::Random random(test::fresh_seed());
  const at::Tensor bias = random.normal({64}, at::kFloat, GetParam());
  at::Tensor logits = random.normal({5000, 64}, at::kFloat, GetParam());
  const at::Tensor dweights = random.normal({5000, 6}, at::kFloat, GetParam());
  const RouterOptions options{
      .num_experts = 64, .num_experts_per_token = 6, .n_group = 8, .topk_group = 3};
  const auto run = [&]() -> std::vector<at::Tensor> {
    at::Tensor leaf = logits.detach().clone().set_requires_grad(true);
    const Routing r = route(leaf, bias, options, {.num_sequences = 5, .valid = {}});
    ((r.weights * dweights).sum() + r.balance_loss).backward();
    return {r.experts, r.weights, r.scores, r.counts, r.balance_loss, leaf.grad()};
  };
  const auto first = run();
  for (int i = 1; i < 10; ++i) {
    const auto again = run();
    for (size_t j = 0; j < first.size(); ++j) EXPECT_TRUE(same_bits(first[j], again[j])) << j;
  }
}

TEST_P(RouterTest, ReadsStridedLogits) {
  test::Random random(test::fresh_seed());
  const at::Tensor wide = random.normal({10, 24}, at::kFloat, GetParam());
  const RouterOptions options{.num_experts = 8, .num_experts_per_token = 2};
  const Routing strided = route(wide.narrow(1, 8, 8), {}, options);
  const Routing packed = route(wide.narrow(1, 8, 8).contiguous(), {}, options);
  EXPECT_TRUE(same_bits(strided.weights, packed.weights));
  EXPECT_TRUE(same_bits(strided.experts, packed.experts));
}

TEST(RouterErrors, NameTheNumberThatIsWrong) {
  const at::Tensor logits = at::zeros({2, 8});
  const auto message = [&](const RouterOptions& options,
                           const at::Tensor& bias = {}) -> std::string {
    try {
      route(logits, bias, options);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(message({.num_experts = 8, .num_experts_per_token = 9}).find("num_experts_per_token"),
            std::string::npos);
  EXPECT_NE(message({.num_experts = 8, .num_experts_per_token = 2, .n_group = 3}).find("n_group"),
            std::string::npos);
  EXPECT_NE(message({.num_experts = 8, .num_experts_per_token = 3, .n_group = 4, .topk_group = 1})
                .find("got 3"),
            std::string::npos);
  EXPECT_NE(message({.num_experts = 16, .num_experts_per_token = 2}).find("[*, 16]"),
            std::string::npos);
  EXPECT_NE(message({.num_experts = 8, .num_experts_per_token = 2}, at::zeros({4})).find("bias"),
            std::string::npos);
}

}  // namespace
}  // namespace dsv3::ops
