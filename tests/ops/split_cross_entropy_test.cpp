#include "ops/split_cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "ops/cross_entropy.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3::ops {
namespace {

using test::close;
using test::same_bits;

class SplitCrossEntropyTest : public testing::TestWithParam<at::Device> {};
INSTANTIATE_TEST_SUITE_P(Devices, SplitCrossEntropyTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) {
                           return std::string(info.param.is_cuda() ? "cuda" : "cpu");
                         });

at::Tensor scalar(double value, const at::Tensor& like) {
  return at::full(
      {}, value,
      like.options().dtype(like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
}

at::Tensor random_labels(test::Random& random, int64_t num_tokens, int64_t vocab,
                         at::Device device) {
  at::Tensor labels = random.integers({num_tokens}, vocab);
  auto* data = labels.mutable_data_ptr<int32_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (random.integer(0, 4) == 0) data[t] = kIgnoreLabel;
  }
  return labels.to(device);
}

/// Widths of the parts; the whole vocabulary is their sum.
using Widths = std::vector<int64_t>;

struct Split {
  TokenLosses first;    // as the first part has them
  at::Tensor gradient;  // of the whole vocabulary
};

/// Every part as a process of its own would run it, the exchange being a stack.
Split run(const at::Tensor& logits, const at::Tensor& labels, const Widths& widths, double scale,
          bool write_gradient = true) {
  std::vector<at::Tensor> parts, statistics;
  std::vector<VocabPart> places;
  int64_t begin = 0;
  for (const int64_t width : widths) {
    parts.push_back(logits.narrow(1, begin, width).contiguous().clone());
    places.push_back({.begin = begin, .total = logits.size(1)});
    statistics.push_back(vocab_statistics(parts.back(), labels, places.back()));
    begin += width;
  }
  Split result;
  for (size_t i = 0; i < parts.size(); ++i) {
    const TokenLosses losses = finish_cross_entropy_(
        parts[i], labels, places[i], at::stack(statistics), scalar(scale, logits), write_gradient);
    if (i == 0) result.first = losses;
    EXPECT_TRUE(same_bits(losses.losses, result.first.losses)) << "part " << i;
    EXPECT_TRUE(same_bits(losses.correct, result.first.correct)) << "part " << i;
  }
  result.gradient = at::cat(parts, 1);
  return result;
}

struct Oracle {
  at::Tensor losses, correct, gradient;
};
Oracle oracle(const at::Tensor& logits, const at::Tensor& labels, double scale) {
  const at::Tensor x = logits.detach().to(at::kDouble).set_requires_grad(true);
  const at::Tensor losses = reference::cross_entropy(x, labels);
  (losses.sum() * scale).backward();
  return {losses, logits.argmax(1).eq(labels).logical_and(labels.ge(0)).to(at::kInt), x.grad()};
}

TEST_P(SplitCrossEntropyTest, PartsTogetherAreTheWhole) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const std::vector<Widths> splits{
      {1}, {7, 1, 5}, {64, 64}, {1000}, {500, 1003}, {16, 32, 8, 40, 1}, {4040, 4040, 4040, 4040}};
  for (const auto& widths : splits) {
    int64_t vocab = 0;
    for (const int64_t width : widths) vocab += width;
    for (const int64_t tokens : {0, 1, 33}) {
      for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
        SCOPED_TRACE(testing::Message() << "T " << tokens << ", V " << vocab << " in "
                                        << widths.size() << ", " << c10::toString(dtype));
        const at::Tensor logits = random.normal({tokens, vocab}, dtype, GetParam(), 2.0);
        const at::Tensor labels = random_labels(random, tokens, vocab, GetParam());
        const Oracle expected = oracle(logits, labels, 0.5);
        const Split actual = run(logits, labels, widths, 0.5);
        const double exact = dtype == at::kDouble ? 1e-13 : 1e-5;
        EXPECT_TRUE(close(actual.first.losses, expected.losses, exact));
        EXPECT_TRUE(same_bits(actual.first.correct, expected.correct));
        EXPECT_TRUE(
            close(actual.gradient, expected.gradient, dtype == at::kBFloat16 ? 1e-2 : exact));
        EXPECT_TRUE(same_bits(run(logits, labels, widths, 0.5, false).gradient, logits));
      }
    }
  }
}

TEST_P(SplitCrossEntropyTest, FloatErrsNoMoreThanTheWholeInOnePiece) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const at::Tensor logits = random.normal({50, 2048}, at::kBFloat16, GetParam(), 2.0);
  const at::Tensor labels = random_labels(random, 50, 2048, GetParam());
  const Oracle expected = oracle(logits, labels, 1.0);
  const at::Tensor x = logits.detach().clone().set_requires_grad(true);
  reference::cross_entropy(x, labels).sum().backward();
  EXPECT_LE(test::relative_error(run(logits, labels, {512, 512, 512, 512}, 1.0).gradient,
                                 expected.gradient),
            1.2 * test::relative_error(x.grad(), expected.gradient));
}

TEST_P(SplitCrossEntropyTest, TheLowestOfEqualLogitsWinsAcrossParts) {
  const auto options = at::TensorOptions(at::kFloat).device(GetParam());
  at::Tensor logits = at::zeros({3, 12}, options);
  logits.select(1, 3).fill_(2.0);
  logits.select(1, 8).fill_(2.0);
  at::Tensor labels = at::full({3}, 3, options.dtype(at::kInt));
  labels[1] = 8;
  labels[2] = 11;
  const at::Tensor correct = run(logits, labels, {4, 4, 4}, 1.0).first.correct;
  EXPECT_EQ(correct[0].item<int>(), 1);
  EXPECT_EQ(correct[1].item<int>(), 0);
  EXPECT_EQ(correct[2].item<int>(), 0);
}

TEST_P(SplitCrossEntropyTest, PartsFarApartNeitherOverflowNorVanish) {
  const auto options = at::TensorOptions(at::kFloat).device(GetParam());
  at::Tensor logits = at::full({2, 64}, -3e4, options);
  logits.narrow(1, 40, 1).fill_(3e4);
  logits.narrow(1, 41, 1).fill_(3e4 - 1);
  at::Tensor labels = at::full({2}, 40, options.dtype(at::kInt));
  labels[1] = 0;
  const Split actual = run(logits, labels, {32, 32}, 1.0);
  const Oracle expected = oracle(logits, labels, 1.0);
  EXPECT_NEAR(actual.first.losses[0].item<double>(), expected.losses[0].item<double>(), 1e-6);
  EXPECT_NEAR(actual.first.losses[1].item<double>(), expected.losses[1].item<double>(), 0.01);
  EXPECT_TRUE(close(actual.gradient, expected.gradient, 1e-5));
}

TEST_P(SplitCrossEntropyTest, TenRunsGiveTheSameBits) {
  test::Random random(test::fresh_seed());
  const at::Tensor logits = random.normal({29, 3000}, at::kBFloat16, GetParam());
  const at::Tensor labels = random_labels(random, 29, 3000, GetParam());
  const Split first = run(logits, labels, {1000, 1200, 800}, 0.3);
  for (int i = 1; i < 10; ++i) {
    const Split again = run(logits, labels, {1000, 1200, 800}, 0.3);
    EXPECT_TRUE(same_bits(again.first.losses, first.first.losses));
    EXPECT_TRUE(same_bits(again.gradient, first.gradient));
  }
}

TEST(SplitCrossEntropyErrors, NameWhatIsWrong) {
  const at::Tensor logits = at::zeros({2, 4}), labels = at::zeros({2}, at::kInt);
  const at::Tensor statistics = at::zeros({1, 2, 4}), scale = at::full({}, 1.0);
  const VocabPart whole{.begin = 0, .total = 4};
  EXPECT_NO_THROW(vocab_statistics(logits, labels, whole));
  EXPECT_THROW(vocab_statistics(logits, labels, {.begin = 1, .total = 4}), std::invalid_argument);
  EXPECT_THROW(vocab_statistics(logits, labels.to(at::kLong), whole), std::invalid_argument);
  EXPECT_THROW(vocab_statistics(logits.t(), at::zeros({4}, at::kInt), whole),
               std::invalid_argument);
  EXPECT_THROW(vocab_statistics(logits, at::full({2}, 4, at::kInt), whole), std::invalid_argument);
  EXPECT_THROW(finish_cross_entropy_(logits, labels, whole, at::zeros({1, 3, 4}), scale, true),
               std::invalid_argument);
  EXPECT_THROW(finish_cross_entropy_(logits, labels, whole, statistics, at::zeros({2}), true),
               std::invalid_argument);
  EXPECT_THROW(
      finish_cross_entropy_(logits, labels, whole, statistics.to(at::kDouble), scale, true),
      std::invalid_argument);
}

}  // namespace
}  // namespace dsv3::ops
