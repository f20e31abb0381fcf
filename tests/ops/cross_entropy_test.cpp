#include "ops/cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/detail/cross_entropy_plan.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3::ops {
namespace {

using test::close;
using test::same_bits;

class CrossEntropyTest : public testing::TestWithParam<at::Device> {};
INSTANTIATE_TEST_SUITE_P(Devices, CrossEntropyTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) {
                           return std::string(info.param.is_cuda() ? "cuda" : "cpu");
                         });

/// Labels of which about one in four is ignored.
at::Tensor random_labels(test::Random& random, int64_t num_tokens, int64_t vocab,
                         at::Device device) {
  at::Tensor labels = random.integers({num_tokens}, vocab);
  auto* data = labels.mutable_data_ptr<int32_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (random.integer(0, 3) == 0) data[t] = kIgnoreLabel;
  }
  return labels.to(device);
}

at::Tensor scalar(double value, at::Device device) {
  return at::full({}, value, at::TensorOptions(at::kFloat).device(device));
}

/// The loss of plain double loops, written apart from every operator.
double plain_loss(const at::Tensor& logits, const at::Tensor& labels) {
  const at::Tensor x = logits.cpu().to(at::kDouble).contiguous(), y = labels.cpu();
  double total = 0.0;
  for (int64_t t = 0; t < x.size(0); ++t) {
    const int32_t label = y.const_data_ptr<int32_t>()[t];
    if (label == kIgnoreLabel) continue;
    const double* row = x.const_data_ptr<double>() + t * x.size(1);
    double sum = 0.0;
    for (int64_t v = 0; v < x.size(1); ++v) sum += std::exp(row[v] - row[label]);
    total += std::log(sum);
  }
  return total;
}

struct Result {
  HeadLoss loss;
  at::Tensor dhidden, dweight;
};

Result run(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& grad,
           const at::Tensor& labels, const at::Tensor& scale) {
  at::Tensor x = hidden.detach().clone().set_requires_grad(true);
  at::Tensor w = weight.detach().clone().set_requires_grad(true);
  Result result{head_cross_entropy(x, {w, grad}, labels, scale), {}, grad};
  result.loss.objective.backward();
  result.dhidden = x.grad();
  EXPECT_FALSE(w.grad().defined()) << "the weight's gradient goes to its bucket only";
  return result;
}

struct Oracle {
  at::Tensor loss_sum, dhidden, dweight;
};

Oracle oracle(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
              double scale) {
  at::Tensor x = hidden.detach().to(at::kDouble).set_requires_grad(true);
  at::Tensor w = weight.detach().to(at::kDouble).set_requires_grad(true);
  const at::Tensor loss = reference::cross_entropy(at::mm(x, w.t()), labels).sum();
  (loss * scale).backward();
  return {loss, x.grad(), w.grad()};
}

struct Case {
  int64_t num_tokens, hidden, vocab;
};

TEST_P(CrossEntropyTest, LossAndGradientsAgreeWithFloat64) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  // The last two need several chunks of logits on the host, the last a short one.
  for (const auto& [t, d, v] : std::vector<Case>{{0, 8, 16},
                                                 {1, 4, 1},
                                                 {1, 16, 264},
                                                 {7, 24, 33},
                                                 {130, 64, 1000},
                                                 {700, 8, 4104},
                                                 {611, 8, 4099}}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(testing::Message()
                   << "T " << t << ", D " << d << ", V " << v << ", " << c10::toString(dtype));
      const at::Tensor hidden = random.normal({t, d}, dtype, GetParam());
      const at::Tensor weight = random.normal({v, d}, dtype, GetParam(), 0.5);
      const at::Tensor labels = random_labels(random, t, v, GetParam());
      const double scale = 1.0 / 37.0;
      // The bucket holds a gradient already: it must be added to.
      const at::Tensor before = random.normal({v, d}, at::kFloat, GetParam(), 0.01);
      const Result actual = run(hidden, weight, before.clone(), labels, scalar(scale, GetParam()));
      const Oracle expected = oracle(hidden, weight, labels, scale);
      const at::Tensor dweight = actual.dweight.to(at::kDouble) - before.to(at::kDouble);
      // BF16: the logits and their gradients are rounded to 8 bits (2^-9 each), as in every BF16
      // training.
      const double most = dtype == at::kFloat ? 1e-5 : 1e-2;
      EXPECT_TRUE(close(actual.loss.loss_sum, expected.loss_sum, most));
      EXPECT_TRUE(close(actual.loss.objective, expected.loss_sum * scale, most));
      EXPECT_TRUE(close(actual.dhidden, expected.dhidden, most));
      EXPECT_TRUE(close(dweight, expected.dweight, most));
      EXPECT_EQ(actual.loss.loss_sum.scalar_type(), at::kFloat);
      EXPECT_EQ(actual.loss.correct.scalar_type(), at::kLong);
      EXPECT_FALSE(actual.loss.loss_sum.requires_grad());
    }
  }
}

TEST_P(CrossEntropyTest, ReferenceAgreesWithPlainLoops) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const at::Tensor logits = random.normal({50, 77}, at::kDouble, GetParam(), 3.0);
  const at::Tensor labels = random_labels(random, 50, 77, GetParam());
  EXPECT_NEAR(reference::cross_entropy(logits, labels).sum().item<double>(),
              plain_loss(logits, labels), 1e-10);
}

TEST_P(CrossEntropyTest, Float64GoesThroughTheSameContract) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const at::Tensor hidden = random.normal({41, 12}, at::kDouble, GetParam());
  const at::Tensor weight = random.normal({30, 12}, at::kDouble, GetParam());
  const at::Tensor labels = random_labels(random, 41, 30, GetParam());
  const at::Tensor scale = scalar(0.25, GetParam()).to(at::kDouble);
  const Result actual = run(hidden, weight, at::zeros_like(weight), labels, scale);
  const Oracle expected = oracle(hidden, weight, labels, 0.25);
  EXPECT_TRUE(close(actual.loss.loss_sum, expected.loss_sum, 1e-13));
  EXPECT_TRUE(close(actual.dhidden, expected.dhidden, 1e-13));
  EXPECT_TRUE(close(actual.dweight, expected.dweight, 1e-13));
}

TEST_P(CrossEntropyTest, Bf16BucketReceivesTheGradient) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const at::Tensor hidden = random.normal({100, 32}, at::kBFloat16, GetParam());
  const at::Tensor weight = random.normal({64, 32}, at::kBFloat16, GetParam(), 0.2);
  const at::Tensor labels = random_labels(random, 100, 64, GetParam());
  const Result actual =
      run(hidden, weight, at::zeros_like(weight), labels, scalar(1.0, GetParam()));
  EXPECT_TRUE(close(actual.dweight, oracle(hidden, weight, labels, 1.0).dweight, 1e-2));
}

TEST_P(CrossEntropyTest, Bf16ErrsNoMoreThanTheSameStepsInLibTorch) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const at::Tensor hidden = random.normal({300, 64}, at::kBFloat16, GetParam());
  const at::Tensor weight = random.normal({1000, 64}, at::kBFloat16, GetParam(), 0.3);
  const at::Tensor labels = random_labels(random, 300, 1000, GetParam());
  const Oracle expected = oracle(hidden, weight, labels, 0.01);
  at::Tensor x = hidden.detach().clone().set_requires_grad(true);
  at::Tensor w = weight.detach().clone().set_requires_grad(true);
  const at::Tensor losses = reference::cross_entropy(at::mm(x, w.t()).to(at::kFloat), labels);
  (losses.sum() * 0.01).backward();
  const Result actual =
      run(hidden, weight, at::zeros_like(weight), labels, scalar(0.01, GetParam()));
  using test::relative_error;
  EXPECT_LE(relative_error(actual.dhidden, expected.dhidden),
            1.2 * relative_error(x.grad(), expected.dhidden));
  EXPECT_LE(relative_error(actual.dweight, expected.dweight),
            1.2 * relative_error(w.grad(), expected.dweight));
  EXPECT_TRUE(close(actual.loss.loss_sum, losses.sum(), 1e-5));
}

/// What cross_entropy_ leaves: the loss, and the logits' gradient.
struct InPlace {
  HeadLoss loss;
  at::Tensor gradient;
};

InPlace run_in_place(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& scale) {
  const at::Tensor start = logits.detach().clone().set_requires_grad(true);
  const at::Tensor given = start.mul(1.0);
  InPlace result{cross_entropy_(given, labels, scale), {}};
  result.loss.objective.backward();
  result.gradient = start.grad();
  EXPECT_TRUE(same_bits(given, result.gradient)) << "the logits' memory holds their gradient";
  return result;
}

TEST_P(CrossEntropyTest, InPlaceAgreesWithFloat64AndErrsNoMoreThanLibTorch) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  // From 24,576 on, CUDA's BF16 rows are kept on chip by clusters; 129,280 is V3's.
  for (const auto& [t, v] : std::vector<std::pair<int64_t, int64_t>>{{0, 50},
                                                                     {1, 1},
                                                                     {3, 7},
                                                                     {40, 1000},
                                                                     {9, 24584},
                                                                     {5, 32000},
                                                                     {300, 32000},
                                                                     {7, 102400},
                                                                     {41, 129280},
                                                                     {2, 129279}}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(testing::Message() << "T " << t << ", V " << v << ", " << c10::toString(dtype));
      const at::Tensor logits = random.normal({t, v}, dtype, GetParam(), 2.0);
      const at::Tensor labels = random_labels(random, t, v, GetParam());
      const auto in_libtorch = [&](at::ScalarType type) {
        const at::Tensor x = logits.detach().to(type).clone().set_requires_grad(true);
        const at::Tensor losses = reference::cross_entropy(x, labels);
        (losses.sum() * 0.125).backward();
        return std::pair(losses.sum(), x.grad());
      };
      const auto expected = in_libtorch(at::kDouble);
      const InPlace actual = run_in_place(logits, labels, scalar(0.125, GetParam()));
      EXPECT_TRUE(close(actual.loss.loss_sum, expected.first, 1e-5));
      EXPECT_TRUE(close(actual.gradient, expected.second, dtype == at::kFloat ? 1e-5 : 1e-2));
      const at::Tensor right = logits.argmax(1).eq(labels).logical_and(labels.ge(0)).sum();
      EXPECT_EQ(actual.loss.correct.item<int64_t>(), right.item<int64_t>());
      if (dtype == at::kBFloat16 && t * v > 1000) {
        EXPECT_LE(test::relative_error(actual.gradient, expected.second),
                  1.2 * test::relative_error(in_libtorch(dtype).second, expected.second));
      }
    }
  }
}

TEST_P(CrossEntropyTest, InPlaceGradientAgreesWithFiniteDifferences) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const at::Tensor logits = random.normal({5, 9}, at::kDouble, GetParam());
  const at::Tensor labels = random_labels(random, 5, 9, GetParam());
  const at::Tensor scale = scalar(0.25, GetParam()).to(at::kDouble);
  const at::Tensor gradient = run_in_place(logits, labels, scale).gradient;
  const at::NoGradGuard guard;
  for (int64_t i = 0; i < logits.numel(); ++i) {
    constexpr double kStep = 1e-5;
    at::Tensor up = logits.clone(), down = logits.clone();
    up.view(-1)[i] += kStep;
    down.view(-1)[i] -= kStep;
    const double slope = (cross_entropy_(up, labels, scale).objective.item<double>() -
                          cross_entropy_(down, labels, scale).objective.item<double>()) /
                         (2 * kStep);
    EXPECT_NEAR(gradient.view(-1)[i].item<double>(), slope, 1e-8);
  }
}

TEST_P(CrossEntropyTest, LabelsThatAreEdgesOfTheRowAndTies) {
  for (const int64_t vocab : {int64_t{77}, int64_t{32000}, int64_t{129280}}) {
    const auto options = at::TensorOptions(at::kBFloat16).device(GetParam());
    at::Tensor logits = at::zeros({4, vocab}, options);
    logits[0][0] = 3.0;
    logits[1][vocab - 1] = 3.0;
    logits[2].fill_(-0.0);
    logits[2][vocab / 2].fill_(0.0);
    logits[3][vocab - 1] = 1.0;
    logits[3][vocab - 9] = 1.0;
    at::Tensor labels = at::zeros({4}, options.dtype(at::kInt));
    labels[1] = vocab - 1;
    labels[3] = vocab - 1;  // tied with a lower id: not the argmax
    const InPlace result = run_in_place(logits, labels, scalar(1.0, GetParam()));
    EXPECT_EQ(result.loss.correct.item<int64_t>(), 3) << "vocab " << vocab;
    EXPECT_NEAR(result.gradient.to(at::kFloat).sum().item<double>(), 0.0, 0.05);
  }
}

TEST_P(CrossEntropyTest, ALabelThatIsNoIdGivesNanOnCuda) {
  if (!GetParam().is_cuda()) GTEST_SKIP() << "the host refuses it";
  for (const int64_t vocab : {int64_t{72}, int64_t{129280}}) {
    const at::Tensor logits =
        at::full({2, vocab}, 0.5, at::TensorOptions(at::kBFloat16).device(GetParam()));
    at::Tensor labels = at::zeros({2}, at::TensorOptions(at::kInt).device(GetParam()));
    labels[0] = vocab;
    const InPlace result = run_in_place(logits, labels, scalar(1.0, GetParam()));
    EXPECT_TRUE(std::isnan(result.loss.loss_sum.item<double>()));
    EXPECT_EQ(result.gradient[0].abs().sum().item<double>(), 0.0);
  }
}

TEST_P(CrossEntropyTest, TenRunsInPlaceGiveTheSameBits) {
  test::Random random(test::fresh_seed());
  for (const int64_t vocab : {int64_t{1003}, int64_t{129280}}) {
    const at::Tensor logits = random.normal({37, vocab}, at::kBFloat16, GetParam());
    const at::Tensor labels = random_labels(random, 37, vocab, GetParam());
    const InPlace first = run_in_place(logits, labels, scalar(0.1, GetParam()));
    for (int i = 1; i < 10; ++i) {
      const InPlace again = run_in_place(logits, labels, scalar(0.1, GetParam()));
      EXPECT_TRUE(same_bits(again.loss.loss_sum, first.loss.loss_sum));
      EXPECT_TRUE(same_bits(again.gradient, first.gradient));
    }
  }
}

TEST(CrossEntropyPlan, HoldsTheRowInSlicesThatFitTheChip) {
  using kernels::detail::cross_entropy_plan;
  using kernels::detail::CrossEntropyPlan;
  for (int64_t vocab = 1; vocab < 300000; vocab += 37) {
    for (const int64_t size : {2, 4}) {
      const CrossEntropyPlan plan = cross_entropy_plan(vocab, size);
      if (plan.blocks == 0) continue;
      ASSERT_GE(plan.slice * plan.blocks, vocab);
      ASSERT_LT(plan.slice * (plan.blocks - 1), vocab) << "the last block has work";
      ASSERT_EQ(plan.slice * size % 16, 0);
      ASSERT_EQ(vocab * size % 16, 0);
      ASSERT_GE(plan.stage_bytes, plan.slice * size);
      ASSERT_GE(plan.stages, 5) << "a row is loaded two steps ahead";
      ASSERT_LE(plan.stages * plan.stage_bytes, CrossEntropyPlan::kSharedBytes);
    }
  }
  EXPECT_EQ(cross_entropy_plan(129280, 2).blocks, 8);
  EXPECT_EQ(cross_entropy_plan(129280, 2).stages, 7);
  EXPECT_EQ(cross_entropy_plan(32000, 2).blocks, 2);
  EXPECT_EQ(cross_entropy_plan(16160, 2).blocks, 0);
}

TEST_P(CrossEntropyTest, AllIgnoredGivesZeros) {
  test::Random random(test::fresh_seed());
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor hidden = random.normal({9, 16}, dtype, GetParam());
    const at::Tensor weight = random.normal({40, 16}, dtype, GetParam());
    const at::Tensor labels =
        at::full({9}, kIgnoreLabel, at::TensorOptions(at::kInt).device(GetParam()));
    const Result actual =
        run(hidden, weight, at::zeros({40, 16}, weight.options().dtype(at::kFloat)), labels,
            scalar(1.0, GetParam()));
    EXPECT_EQ(actual.loss.objective.item<double>(), 0.0);
    EXPECT_EQ(actual.loss.correct.item<int64_t>(), 0);
    EXPECT_EQ(actual.dhidden.abs().sum().item<double>(), 0.0);
    EXPECT_EQ(actual.dweight.abs().sum().item<double>(), 0.0);
  }
}

TEST_P(CrossEntropyTest, CorrectCountsTheFirstOfEqualLogits) {
  for (const int64_t vocab : {24, 37}) {
    // hidden is 1, so the logits are the weight's column: a tie of ids 3 and 20 at the top.
    at::Tensor weight = at::zeros({vocab, 8}, at::TensorOptions(at::kFloat).device(GetParam()));
    weight[3][0] = 2.0;
    weight[20][0] = 2.0;
    at::Tensor hidden = at::zeros({4, 8}, weight.options());
    hidden.select(1, 0).fill_(1.0);
    at::Tensor labels = at::full({4}, kIgnoreLabel, weight.options().dtype(at::kInt));
    labels[0] = 3;
    labels[1] = 20;
    labels[2] = 5;
    const HeadLoss loss = head_cross_entropy(hidden, {weight, {}}, labels, scalar(1.0, GetParam()));
    EXPECT_EQ(loss.correct.item<int64_t>(), 1);
  }
}

TEST_P(CrossEntropyTest, LargeLogitsNeitherOverflowNorLoseTheLoss) {
  const auto options = at::TensorOptions(at::kFloat).device(GetParam());
  at::Tensor weight = at::full({300, 1}, -3e4, options);
  weight[7][0] = 3e4;
  weight[8][0] = 3e4 - 1;
  at::Tensor labels = at::full({2}, 7, options.dtype(at::kInt));
  labels[1] = 0;
  const at::Tensor hidden = at::full({2, 1}, 1.0, options);
  const Result result =
      run(hidden, weight, at::zeros_like(weight), labels, scalar(1.0, GetParam()));
  EXPECT_NEAR(result.loss.loss_sum.item<double>(), 6e4 + 2 * std::log1p(std::exp(-1.0)), 0.01);
  EXPECT_TRUE(std::isfinite(result.dhidden.abs().sum().item<double>()));
}

TEST_P(CrossEntropyTest, WithoutRecordingNothingIsAdded) {
  test::Random random(test::fresh_seed());
  at::Tensor hidden = random.normal({20, 16}, at::kFloat, GetParam()).set_requires_grad(true);
  at::Tensor weight = random.normal({40, 16}, at::kFloat, GetParam()).set_requires_grad(true);
  const at::Tensor labels = random_labels(random, 20, 40, GetParam());
  const at::Tensor grad = at::zeros_like(weight);
  const at::Tensor recorded =
      run(hidden, weight, at::zeros_like(weight), labels, scalar(1.0, GetParam())).loss.loss_sum;
  const at::NoGradGuard guard;
  const HeadLoss loss = head_cross_entropy(hidden, {weight, grad}, labels, scalar(1.0, GetParam()));
  EXPECT_FALSE(loss.objective.requires_grad());
  EXPECT_EQ(grad.abs().sum().item<double>(), 0.0);
  EXPECT_TRUE(same_bits(loss.loss_sum, recorded));
}

TEST_P(CrossEntropyTest, AFrozenHeadStillGivesTheHiddenItsGradient) {
  test::Random random(test::fresh_seed());
  at::Tensor hidden = random.normal({20, 16}, at::kFloat, GetParam()).set_requires_grad(true);
  const at::Tensor weight = random.normal({40, 16}, at::kFloat, GetParam());
  const at::Tensor labels = random_labels(random, 20, 40, GetParam());
  head_cross_entropy(hidden, {weight, {}}, labels, scalar(1.0, GetParam())).objective.backward();
  EXPECT_TRUE(close(hidden.grad(), oracle(hidden, weight, labels, 1.0).dhidden, 1e-5));
}

TEST_P(CrossEntropyTest, TwoRunsGiveTheSameBits) {
  test::Random random(test::fresh_seed());
  const at::Tensor hidden = random.normal({300, 32}, at::kBFloat16, GetParam());
  const at::Tensor weight = random.normal({2000, 32}, at::kBFloat16, GetParam());
  const at::Tensor labels = random_labels(random, 300, 2000, GetParam());
  const auto again = [&] {
    return run(hidden, weight, at::zeros_like(weight), labels, scalar(0.1, GetParam()));
  };
  const Result a = again(), b = again();
  EXPECT_TRUE(same_bits(a.loss.objective, b.loss.objective));
  EXPECT_TRUE(same_bits(a.dhidden, b.dhidden));
  EXPECT_TRUE(same_bits(a.dweight, b.dweight));
}

TEST(CrossEntropyErrors, NameWhatIsWrong) {
  const at::Tensor hidden = at::zeros({2, 4}), weight = at::zeros({10, 4}),
                   scale = at::full({}, 1.0);
  const auto ints = at::TensorOptions(at::kInt);
  EXPECT_THROW(head_cross_entropy(hidden, {weight, {}}, at::full({2}, 10, ints), scale),
               std::invalid_argument);
  EXPECT_THROW(head_cross_entropy(hidden, {weight, {}}, at::full({2}, -1, ints), scale),
               std::invalid_argument);
  EXPECT_THROW(head_cross_entropy(hidden, {weight, {}}, at::zeros({3}, ints), scale),
               std::invalid_argument);
  EXPECT_THROW(head_cross_entropy(hidden, {weight, {}}, at::zeros({2}), scale),
               std::invalid_argument);
  EXPECT_THROW(head_cross_entropy(hidden, {at::zeros({10, 5}), {}}, at::zeros({2}, ints), scale),
               std::invalid_argument);
  EXPECT_THROW(head_cross_entropy(hidden, {weight, {}}, at::zeros({2}, ints), at::zeros({2})),
               std::invalid_argument);
}

TEST(HeadChunkTokens, CoversTheTokensInEqualChunksWithinTheBudget) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (int i = 0; i < 1000; ++i) {
    const int64_t tokens = random.integer(0, 70000), vocab = random.integer(1, 200000);
    const bool cuda = random.integer(0, 1) == 1;
    const int64_t chunk = head_chunk_tokens(tokens, vocab, 2, cuda);
    ASSERT_GE(chunk, 1);
    const int64_t least = cuda ? 128 : 512, budget = (cuda ? int64_t{1024} : int64_t{4}) << 20;
    ASSERT_TRUE(chunk <= least || chunk * vocab * 2 <= budget)
        << tokens << " " << vocab << " " << cuda;
    const int64_t chunks = (tokens + chunk - 1) / chunk;
    ASSERT_TRUE(chunks <= 1 || tokens > (chunks - 1) * chunk);
  }
  EXPECT_EQ(head_chunk_tokens(16384, 129280, 2, true) % 128, 0);
}

}  // namespace
}  // namespace dsv3::ops
