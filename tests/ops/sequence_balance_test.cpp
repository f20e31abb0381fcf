#include <ATen/TensorOperators.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <set>

#include "ops/router.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3::ops {
namespace {

using test::close;
using test::same_bits;

class SequenceBalanceTest : public testing::TestWithParam<at::Device> {};
INSTANTIATE_TEST_SUITE_P(Devices, SequenceBalanceTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) {
                           return std::string(info.param.is_cuda() ? "cuda" : "cpu");
                         });

/// Equations 17–20 of the report in plain loops.
double plain_loss(const at::Tensor& scores, const at::Tensor& valid, int64_t num_sequences,
                  int64_t k) {
  const int64_t length = scores.size(0) / num_sequences, num_experts = scores.size(1);
  const auto* s = scores.const_data_ptr<double>();
  double loss = 0.0;
  for (int64_t b = 0; b < num_sequences; ++b) {
    std::vector<double> f(static_cast<size_t>(num_experts)), p(static_cast<size_t>(num_experts));
    double n = 0.0;
    for (int64_t t = b * length; t < (b + 1) * length; ++t) {
      if (valid.defined() && !valid[t].item<bool>()) continue;
      n += 1.0;
      double sum = 0.0;
      for (int64_t e = 0; e < num_experts; ++e) sum += s[t * num_experts + e];
      std::set<int64_t> taken;
      for (int64_t i = 0; i < k; ++i) {
        int64_t best = -1;
        for (int64_t e = 0; e < num_experts; ++e) {
          if (taken.count(e) == 0 &&
              (best < 0 || s[t * num_experts + e] > s[t * num_experts + best]))
            best = e;
        }
        taken.insert(best);
        f[static_cast<size_t>(best)] += 1.0;
      }
      for (int64_t e = 0; e < num_experts; ++e)
        p[static_cast<size_t>(e)] += s[t * num_experts + e] / sum;
    }
    if (n == 0.0) continue;
    for (size_t e = 0; e < f.size(); ++e) {
      loss += static_cast<double>(num_experts) / (static_cast<double>(k) * n) * f[e] * p[e] / n;
    }
  }
  return loss;
}

at::Tensor random_valid(test::Random& random, int64_t num_tokens, int64_t all_invalid_below) {
  at::Tensor valid = at::zeros({num_tokens}, at::TensorOptions(at::kBool));
  auto* data = valid.mutable_data_ptr<bool>();
  for (int64_t t = all_invalid_below; t < num_tokens; ++t) data[t] = random.integer(0, 2) > 0;
  return valid;
}

struct Case {
  int64_t num_sequences, length;
  RouterOptions options;
};

/// Selection by bias and groups must not touch the loss: cases with, without and with either.
std::vector<Case> cases() {
  return {{1, 1, {.num_experts = 1, .num_experts_per_token = 1}},
          {2, 5, {.num_experts = 4, .num_experts_per_token = 2}},
          {3, 130, {.num_experts = 16, .num_experts_per_token = 2, .n_group = 4, .topk_group = 2}},
          {2, 257, {.num_experts = 64, .num_experts_per_token = 6, .sigmoid = false}},
          {1, 40, {.num_experts = 256, .num_experts_per_token = 8, .n_group = 8, .topk_group = 4}},
          {40, 3, {.num_experts = 20, .num_experts_per_token = 3}},
          {1, 9000, {.num_experts = 8, .num_experts_per_token = 2}},
          {1, 3, {.num_experts = 512, .num_experts_per_token = 16}}};
}

at::Tensor scores_of(const at::Tensor& logits, const RouterOptions& options) {
  return options.sigmoid ? at::sigmoid(logits) : at::softmax(logits, -1);
}

TEST_P(SequenceBalanceTest, LossAndGradientAgreeWithFloat64) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [b, length, options] : cases()) {
    for (const int variant : {0, 1, 2}) {  // plain, with a bias, masked
      SCOPED_TRACE(testing::Message() << "B " << b << ", S " << length << ", E "
                                      << options.num_experts << ", variant " << variant);
      const int64_t e = options.num_experts;
      // Values on a grid, so that FP32 and float64 rank alike, ties included.
      const at::Tensor raw = (random.normal({b * length, e}, at::kDouble) * 16).round() / 16;
      const at::Tensor bias = random.normal({e}, at::kFloat, GetParam(), 0.3, -2.0);
      // The first sequence has no valid token at all.
      const at::Tensor valid =
          variant == 2 ? random_valid(random, b * length, length) : at::Tensor();
      at::Tensor exact = raw.clone().set_requires_grad(true);
      at::Tensor logits = raw.to(GetParam(), at::kFloat).detach().set_requires_grad(true);
      const Routing routing =
          route(logits, variant == 1 ? bias : at::Tensor(), options,
                {.num_sequences = b, .valid = valid.defined() ? valid.to(GetParam()) : valid});
      const at::Tensor expected =
          reference::route(exact, {}, options, {.num_sequences = b, .valid = valid}).balance_loss;
      const double plain =
          plain_loss(scores_of(raw, options), valid, b, options.num_experts_per_token);
      EXPECT_NEAR(expected.item<double>(), plain, 1e-12 * (1 + plain));
      EXPECT_TRUE(close(routing.balance_loss, expected, 2e-6));
      (routing.balance_loss * 0.5).backward();
      (expected * 0.5).backward();
      // c_i - Σ c s / Σ s cancels: a uniform row has gradient 0 and rounding only.
      const double size = exact.grad().norm().item<double>();
      EXPECT_LE((logits.grad().cpu().to(at::kDouble) - exact.grad()).norm().item<double>(),
                1e-5 * size + 1e-8);
    }
  }
}

TEST_P(SequenceBalanceTest, GradientsOfWeightsAndLossAddUp) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [b, length, options] : cases()) {
    const at::Tensor raw =
        (random.normal({b * length, options.num_experts}, at::kDouble) * 16).round() / 16;
    const at::Tensor d =
        random.normal({b * length, options.num_experts_per_token}, at::kDouble) * 1e-3;
    at::Tensor exact = raw.clone().set_requires_grad(true);
    at::Tensor logits = raw.to(GetParam(), at::kFloat).detach().set_requires_grad(true);
    const SequenceBalance balance{.num_sequences = b, .valid = {}};
    const Routing routing = route(logits, {}, options, balance);
    const Routing expected = reference::route(exact, {}, options, balance);
    EXPECT_TRUE(same_bits(routing.experts.cpu(), expected.experts));
    ((routing.weights * d.to(logits.options())).sum() + routing.balance_loss).backward();
    ((expected.weights * d).sum() + expected.balance_loss).backward();
    const double size = exact.grad().norm().item<double>();
    EXPECT_LE((logits.grad().cpu().to(at::kDouble) - exact.grad()).norm().item<double>(),
              1e-5 * size + 1e-8);
  }
}

TEST(SequenceBalanceReference, GradientAgreesWithFiniteDifferences) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const RouterOptions options{.num_experts = 5, .num_experts_per_token = 2};
  const int64_t b = 2, length = 6;
  at::Tensor logits = random.normal({b * length, 5}, at::kDouble).set_requires_grad(true);
  const at::Tensor valid = random_valid(random, b * length, 0);
  reference::route(logits, {}, options, {.num_sequences = b, .valid = valid})
      .balance_loss.backward();
  const at::Tensor direction = random.normal({b * length, 5}, at::kDouble);
  const double h = 1e-7;  // small enough not to change a selection, but for one draw in thousands
  const auto at_step = [&](double step) {
    return plain_loss(at::sigmoid(logits.detach() + direction * step), valid, b, 2);
  };
  const double slope = (at_step(h) - at_step(-h)) / (2 * h);
  EXPECT_NEAR((logits.grad() * direction).sum().item<double>(), slope, 1e-6);
}

TEST_P(SequenceBalanceTest, DoesNotDependOnHowTheBatchIsSplit) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const RouterOptions options{.num_experts = 16, .num_experts_per_token = 3};
  const int64_t b = 4, length = 1500;
  const at::Tensor values = random.normal({b * length, 16}, at::kFloat, GetParam());
  const at::Tensor valid = random_valid(random, b * length, 0).to(GetParam());
  at::Tensor whole = values.detach().clone().set_requires_grad(true);
  const at::Tensor loss =
      route(whole, {}, options, {.num_sequences = b, .valid = valid}).balance_loss;
  loss.backward();
  double sum = 0.0;
  for (int64_t i = 0; i < b; ++i) {
    at::Tensor part = values.narrow(0, i * length, length).detach().clone().set_requires_grad(true);
    const at::Tensor mask = valid.narrow(0, i * length, length);
    const at::Tensor piece =
        route(part, {}, options, {.num_sequences = 1, .valid = mask}).balance_loss;
    piece.backward();
    sum += piece.item<double>();
    EXPECT_TRUE(same_bits(part.grad(), whole.grad().narrow(0, i * length, length)));
  }
  EXPECT_NEAR(loss.item<double>(), sum, 1e-5 * sum);
}

TEST_P(SequenceBalanceTest, NoTokensNoLoss) {
  const at::Tensor logits = at::zeros({0, 8}, at::TensorOptions(at::kFloat).device(GetParam()));
  const RouterOptions options{.num_experts = 8, .num_experts_per_token = 2};
  const Routing routing = route(logits, {}, options, {.num_sequences = 2, .valid = {}});
  EXPECT_EQ(routing.balance_loss.item<float>(), 0.0f);
  EXPECT_EQ(routing.counts.sum().item<int64_t>(), 0);
}

TEST(SequenceBalanceErrors, NameWhatIsWrong) {
  const at::Tensor logits = at::zeros({6, 4});
  const RouterOptions options{.num_experts = 4, .num_experts_per_token = 2};
  EXPECT_THROW(route(logits, {}, options, {.num_sequences = 4, .valid = {}}),
               std::invalid_argument);
  EXPECT_THROW(route(logits, {}, options, {.num_sequences = 2, .valid = at::zeros({6})}),
               std::invalid_argument);
  EXPECT_THROW(route(logits, {}, options, {.num_sequences = 2, .valid = at::zeros({5}, at::kBool)}),
               std::invalid_argument);
}

}  // namespace
}  // namespace dsv3::ops
