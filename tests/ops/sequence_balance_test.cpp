#include <ATen/TensorOperators.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
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
  int64_t num_sequences, length, num_experts, k;
};

TEST_P(SequenceBalanceTest, LossAndGradientAgreeWithFloat64) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [b, length, e, k] : std::vector<Case>{{1, 1, 1, 1},
                                                         {2, 5, 4, 2},
                                                         {3, 130, 16, 2},
                                                         {2, 257, 64, 6},
                                                         {1, 40, 256, 8},
                                                         {1, 3, 512, 16}}) {
    for (const bool masked : {false, true}) {
      SCOPED_TRACE(testing::Message() << "B " << b << ", S " << length << ", E " << e << ", K " << k
                                      << (masked ? ", masked" : ""));
      // Values on a grid, so that FP32 and float64 rank alike, ties included.
      const at::Tensor raw = (random.normal({b * length, e}, at::kDouble) * 16).round() / 16;
      const at::Tensor rounded = at::sigmoid(raw).to(at::kFloat);
      // The first sequence has no valid token at all.
      const at::Tensor valid = masked ? random_valid(random, b * length, length) : at::Tensor();
      at::Tensor exact = rounded.to(at::kDouble).set_requires_grad(true);
      at::Tensor scores = rounded.to(GetParam()).detach().set_requires_grad(true);
      const at::Tensor loss =
          sequence_balance_loss(scores, masked ? valid.to(GetParam()) : valid, b, k);
      const at::Tensor expected = sequence_balance_loss(exact, valid, b, k);
      EXPECT_NEAR(expected.item<double>(), plain_loss(exact.detach(), valid, b, k),
                  1e-12 * (1 + expected.item<double>()));
      EXPECT_TRUE(close(loss, expected, 2e-6));
      (loss * 0.5).backward();
      (expected * 0.5).backward();
      // c_i - Σ c s / Σ s cancels: a uniform row has gradient 0 and rounding only.
      const double size = exact.grad().norm().item<double>();
      EXPECT_LE((scores.grad().cpu().to(at::kDouble) - exact.grad()).norm().item<double>(),
                1e-5 * size + 1e-8);
    }
  }
}

TEST(SequenceBalanceReference, GradientAgreesWithFiniteDifferences) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const int64_t b = 2, length = 6, e = 5, k = 2;
  at::Tensor scores =
      at::sigmoid(random.normal({b * length, e}, at::kDouble)).set_requires_grad(true);
  const at::Tensor valid = random_valid(random, b * length, 0);
  reference::sequence_balance_loss(scores, valid, b, k).backward();
  const at::Tensor direction = random.normal({b * length, e}, at::kDouble);
  const double h = 1e-7;  // small enough not to change a selection, but for one draw in thousands
  const auto at_step = [&](double step) {
    return plain_loss((scores.detach() + direction * step).contiguous(), valid, b, k);
  };
  const double slope = (at_step(h) - at_step(-h)) / (2 * h);
  EXPECT_NEAR((scores.grad() * direction).sum().item<double>(), slope, 1e-6);
}

TEST_P(SequenceBalanceTest, DoesNotDependOnHowTheBatchIsSplit) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const int64_t b = 4, length = 150, e = 16, k = 3;
  const at::Tensor values = at::sigmoid(random.normal({b * length, e}, at::kFloat, GetParam()));
  const at::Tensor valid = random_valid(random, b * length, 0).to(GetParam());
  at::Tensor whole = values.detach().clone().set_requires_grad(true);
  const at::Tensor loss = sequence_balance_loss(whole, valid, b, k);
  loss.backward();
  double sum = 0.0;
  for (int64_t i = 0; i < b; ++i) {
    at::Tensor part = values.narrow(0, i * length, length).detach().clone().set_requires_grad(true);
    const at::Tensor piece = sequence_balance_loss(part, valid.narrow(0, i * length, length), 1, k);
    piece.backward();
    sum += piece.item<double>();
    EXPECT_TRUE(same_bits(part.grad(), whole.grad().narrow(0, i * length, length)));
  }
  EXPECT_NEAR(loss.item<double>(), sum, 1e-5 * sum);
}

TEST_P(SequenceBalanceTest, TwoRunsGiveTheSameBits) {
  test::Random random(test::fresh_seed());
  const at::Tensor scores = at::sigmoid(random.normal({1000, 24}, at::kFloat, GetParam()));
  EXPECT_TRUE(
      same_bits(sequence_balance_loss(scores, {}, 2, 4), sequence_balance_loss(scores, {}, 2, 4)));
}

TEST(SequenceBalanceErrors, NameWhatIsWrong) {
  const at::Tensor scores = at::zeros({6, 4});
  EXPECT_THROW(sequence_balance_loss(scores, {}, 4, 2), std::invalid_argument);
  EXPECT_THROW(sequence_balance_loss(scores, {}, 2, 5), std::invalid_argument);
  EXPECT_THROW(sequence_balance_loss(scores, at::zeros({6}), 2, 2), std::invalid_argument);
}

}  // namespace
}  // namespace dsv3::ops
