#include "training/step.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>

#include "kernels/optimizer.h"
#include "support/compare.h"
#include "training/tiny.h"

namespace dsv3 {
namespace {

struct Outcome {
  at::Tensor gradients;  // every bucket, end to end
  StepSums sums;
};

class StepTest : public testing::TestWithParam<at::Device> {
 protected:
  uint64_t seed_ = test::fresh_seed();
  test::Random random_{seed_};
  ModelConfig config_ = test::tiny_model();

  /// Gradients of one global batch from fresh, equal weights; biases are drawn, so that routing is
  /// not trivial.
  Outcome run(std::vector<Batch> micro_batches, const GradientOptions& given) {
    GradientOptions options = given;
    options.device = GetParam();
    ParameterSet parameters;
    const Model model(config_, parameters);
    parameters.allocate({.dtype = config_.dtype, .gradients = true, .cuda = GetParam().is_cuda()});
    parameters.initialize(7);
    test::Random random(seed_ + 1);
    for (auto& parameter : parameters.parameters()) {
      if (parameter.spec.trainable) continue;
      for (int64_t i = 0; i < parameter.spec.numel(); ++i)
        parameter.weight.value[i].fill_(random.uniform(-0.1, 0.1));
    }
    const auto global = make_global_batch(
        std::move(micro_batches), config_.mtp.num_nextn_predict_layers, options.mask_documents);
    Outcome outcome;
    outcome.sums = accumulate_gradients(model, global, options);
    std::vector<at::Tensor> gradients;
    for (const auto& bucket : parameters.buckets())
      gradients.push_back(bucket.grads.to(at::kFloat));
    outcome.gradients = at::cat(gradients);
    return outcome;
  }

  std::vector<Batch> split(const Batch& whole, int64_t size) {
    std::vector<Batch> parts;
    for (int64_t first = 0; first < whole.num_sequences; first += size)
      parts.push_back(test::rows_of(whole, first, std::min(size, whole.num_sequences - first)));
    return parts;
  }

  void expect_equal(const Outcome& actual, const Outcome& expected) {
    EXPECT_TRUE(test::close(actual.sums.scalars, expected.sums.scalars, 1e-6));
    EXPECT_TRUE(test::close(actual.gradients, expected.gradients, 1e-6));
    EXPECT_TRUE(test::same_bits(actual.sums.load.tokens, expected.sums.load.tokens));
    EXPECT_GT(expected.gradients.norm().item<float>(), 0);
  }
};

TEST_P(StepTest, AccumulationEqualsOneBigBatch) {
  SCOPED_TRACE(test::seed_text(seed_));
  const auto whole = test::random_batch(random_, config_, 4, 19);
  for (const bool mask : {false, true}) {
    const GradientOptions options{.mask_documents = mask, .balance_alpha = 1e-2, .mtp_weight = 0.3};
    const auto expected = run({whole}, options);
    expect_equal(run(split(whole, 1), options), expected);
    expect_equal(run(split(whole, 3), options), expected);  // 3 + 1
  }
}

TEST_P(StepTest, AMicroBatchWithoutValidLabelsWeighsNothing) {
  SCOPED_TRACE(test::seed_text(seed_));
  const GradientOptions options{.mtp_weight = 0.3};
  const auto some = test::random_batch(random_, config_, 2, 11);
  const auto none = test::random_batch(random_, config_, 1, 11, /*none_valid=*/true);
  const auto alone = run({some}, options), both = run({none, some}, options);
  EXPECT_TRUE(test::close(both.gradients, alone.gradients, 1e-6));
  const auto nothing = run({none}, options);
  EXPECT_EQ(nothing.gradients.norm().item<float>(), 0) << "no valid label, no gradient, no NaN";
}

TEST_P(StepTest, BalanceGradientDoesNotDependOnTheSplit) {
  SCOPED_TRACE(test::seed_text(seed_));
  // Without valid labels only the balance loss is left.
  const auto whole = test::random_batch(random_, config_, 6, 13, /*none_valid=*/true);
  const GradientOptions options{.balance_alpha = 1.0};
  const auto expected = run({whole}, options);
  expect_equal(run(split(whole, 1), options), expected);
  expect_equal(run(split(whole, 4), options), expected);
}

TEST_P(StepTest, RecomputationChangesNoGradientAndCountsNoTokenTwice) {
  SCOPED_TRACE(test::seed_text(seed_));
  const auto whole = test::random_batch(random_, config_, 3, 17);
  const GradientOptions options{.balance_alpha = 1e-2, .mtp_weight = 0.3};
  const auto expected = run({whole}, options);
  const int64_t layers = expected.sums.load.tokens.size(0);
  EXPECT_EQ(layers, 2);  // the MoE layer and the MTP module's
  // The MTP module has no token at a sequence's last place.
  EXPECT_EQ(expected.sums.load.tokens.sum().item<int64_t>(),
            3 * (17 + 16) * config_.moe.num_experts_per_token);
  for (const auto policy : {Recompute::kSelective, Recompute::kFull}) {
    GradientOptions again = options;
    again.recompute = policy;
    expect_equal(run(split(whole, 2), again), expected);
  }
}

TEST_P(StepTest, NumbersAreMeansOverTheGlobalBatch) {
  SCOPED_TRACE(test::seed_text(seed_));
  const auto whole = test::random_batch(random_, config_, 4, 12);
  const auto global = make_global_batch(split(whole, 1), 1, false);
  EXPECT_EQ(global.tokens, 48);
  EXPECT_EQ(global.sequences, 4);
  const auto outcome = run(split(whole, 1), {.mtp_weight = 0.3});
  const at::Tensor moved =
      at::tensor({0.04, 4.0}, at::TensorOptions(at::kDouble).device(GetParam()));
  const GradientNorm norm{
      outcome.gradients.norm(),
      at::full({}, kernels::kSkipSpike, at::TensorOptions(at::kInt).device(GetParam())), moved};
  const auto numbers =
      PendingNumbers(outcome.sums, norm, global, {.biases = {}, .with_loads = true, .timer = {}})
          .wait();
  EXPECT_NEAR(numbers.loss, std::log(264.0), 0.5);  // random weights guess evenly
  ASSERT_EQ(numbers.mtp_losses.size(), 1u);
  EXPECT_NEAR(numbers.mtp_losses[0], std::log(264.0), 0.5);
  EXPECT_GE(numbers.mtp_acceptances[0], 0);
  EXPECT_DOUBLE_EQ(numbers.loss * static_cast<double>(global.valid),
                   outcome.sums.scalars[0].item<double>());
  EXPECT_FLOAT_EQ(static_cast<float>(numbers.grad_norm), outcome.gradients.norm().item<float>());
  EXPECT_EQ(numbers.skip, kernels::kSkipSpike);
  EXPECT_NEAR(numbers.update_to_weight, 0.1, 1e-12);
  const at::Tensor loads = outcome.sums.load.tokens.to(at::kCPU, at::kDouble);
  ASSERT_EQ(numbers.layers.size(), 2u);
  ASSERT_EQ(numbers.loads.size(), 2u);
  for (int64_t layer = 0; layer < loads.size(0); ++layer) {
    const auto i = static_cast<size_t>(layer);
    EXPECT_NEAR(numbers.layers[i][kernels::kMaxViolation],
                loads[layer].max().div(loads[layer].mean()).item<double>() - 1, 1e-9);
    EXPECT_GE(numbers.layers[i][kernels::kMicroViolation],
              numbers.layers[i][kernels::kMaxViolation] - 1e-9)
        << "a maximum of sums is no more than the sum of the maxima";
    EXPECT_EQ(numbers.layers[i][kernels::kBiasSpread], 0) << "no bias was given";
    for (int64_t expert = 0; expert < loads.size(1); ++expert)
      EXPECT_EQ(static_cast<double>(numbers.loads[i][static_cast<size_t>(expert)]),
                loads[layer][expert].item<double>());
  }
}

TEST_P(StepTest, AStepThatMovedNothingHasNoRatio) {
  StepSums sums;
  sums.scalars = at::zeros({3}, at::TensorOptions(at::kDouble).device(GetParam()));
  const GradientNorm norm{sums.scalars[0], sums.scalars[1], at::zeros({2}, sums.scalars.options())};
  GlobalBatch batch;
  batch.valid = batch.sequences = 1;
  const auto numbers = PendingNumbers(sums, norm, batch).wait();
  EXPECT_TRUE(std::isnan(numbers.update_to_weight));
  EXPECT_TRUE(std::isnan(numbers.balance_loss));
  EXPECT_TRUE(numbers.layers.empty());
}

TEST_P(StepTest, PhasesAddUpTheirStretches) {
  PhaseTimer timer(GetParam());
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 3; ++i) {
    timer.begin(Phase::kForward);
    timer.begin(Phase::kBackward);
  }
  timer.end();
  timer.begin(Phase::kOptimizer);
  timer.end();
  at::zeros({1}, at::TensorOptions(GetParam())).to(at::kCPU);  // waits for the device
  const double all =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  double sum = 0;
  for (const double seconds : timer.seconds()) {
    EXPECT_GE(seconds, 0);
    sum += seconds;
  }
  EXPECT_LE(sum, all);
}

TEST(GlobalBatch, CountsValidLabelsByDepthAndDocument) {
  Batch batch{.num_sequences = 1,
              .sequence_length = 5,
              .tokens = {1, 2, 3, 4, 5},
              .labels = {2, 3, kIgnoreLabelId, 5, 6},
              .positions = {0, 1, 2, 0, 1},
              .documents = {0, 0, 0, 1, 1}};
  auto global = make_global_batch({batch, batch}, 2, false);
  EXPECT_EQ(global.valid, 8);
  EXPECT_EQ(global.mtp_valid, (std::vector<int64_t>{6, 4}));
  global = make_global_batch({batch, batch}, 2, true);
  EXPECT_EQ(global.mtp_valid, (std::vector<int64_t>{4, 0}));
  EXPECT_FALSE(to_device(batch, at::Device(at::kCPU), false).documents.defined());
  EXPECT_FALSE(to_device(batch, at::Device(at::kCPU), true).valid.defined());
}

// Padding is told by its document; an ignored label before a border is a real token.
TEST(GlobalBatch, PaddingIsMarkedForTheModel) {
  const Batch batch{
      .num_sequences = 2,
      .sequence_length = 3,
      .tokens = {1, 2, 9, 9, 9, 9},
      .labels = {kIgnoreLabelId, 3, kIgnoreLabelId, kIgnoreLabelId, kIgnoreLabelId, kIgnoreLabelId},
      .positions = {0, 1, 2, 0, 1, 2},
      .documents = {0, 0, kPaddingDocument, kPaddingDocument, kPaddingDocument, kPaddingDocument}};
  for (const bool mask : {false, true}) {
    const TokenBatch tokens = to_device(batch, at::Device(at::kCPU), mask);
    EXPECT_EQ(tokens.documents.defined(), mask);
    ASSERT_TRUE(tokens.valid.defined());
    for (int64_t i = 0; i < 6; ++i) EXPECT_EQ(tokens.valid[i].item<bool>(), i < 2) << i;
  }
  EXPECT_EQ(make_global_batch({batch}, 0, false).sequences, 1);
}

INSTANTIATE_TEST_SUITE_P(Devices, StepTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) { return info.param.is_cuda() ? "cuda" : "cpu"; });

}  // namespace
}  // namespace dsv3
