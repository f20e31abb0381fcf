#include "inference/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace dsv3 {
namespace {

/// Share of each id among many draws.
std::vector<double> frequencies(const std::vector<float>& logits, const SamplingOptions& options,
                                uint64_t seed, int draws = 40000) {
  SamplingRandom random(seed);
  std::vector<double> counts(logits.size());
  for (int i = 0; i < draws; ++i) {
    counts[static_cast<size_t>(sample_token(logits, options, random))] += 1.0 / draws;
  }
  return counts;
}

std::vector<double> softmax(const std::vector<float>& logits, double temperature) {
  std::vector<double> p;
  double sum = 0;
  for (const float x : logits) sum += p.emplace_back(std::exp(x / temperature));
  for (double& x : p) x /= sum;
  return p;
}

/// 5 standard deviations of a share over `draws`: a sound sampler fails once in a million.
void expect_distribution(const std::vector<double>& seen, const std::vector<double>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double deviation = std::sqrt(expected[i] * (1 - expected[i]) / 40000);
    EXPECT_NEAR(seen[i], expected[i], 5 * deviation + 1e-9) << "id " << i;
  }
}

class Sampling : public ::testing::Test {
 protected:
  Sampling() : seed_(std::random_device{}()) { RecordProperty("seed", std::to_string(seed_)); }
  uint64_t seed_;
  const std::vector<float> logits_ = {1.0f, -0.5f, 2.0f, 0.25f, -INFINITY, 2.0f, -3.0f};
};

TEST_F(Sampling, DrawsTheSoftmaxAtEveryTemperature) {
  SCOPED_TRACE(testing::Message() << "seed " << seed_);
  for (const double temperature : {0.5, 1.0, 3.0}) {
    const auto seen = frequencies(logits_, {.temperature = temperature}, seed_);
    expect_distribution(seen, softmax(logits_, temperature));
    EXPECT_EQ(seen[4], 0) << "-inf was drawn";
  }
}

TEST_F(Sampling, TopKKeepsTheLikeliest) {
  SCOPED_TRACE(testing::Message() << "seed " << seed_);
  auto expected = softmax(logits_, 1);
  const double kept = expected[2] + expected[5] + expected[0];
  for (size_t i = 0; i < expected.size(); ++i) {
    expected[i] = i == 2 || i == 5 || i == 0 ? expected[i] / kept : 0;
  }
  expect_distribution(frequencies(logits_, {.top_k = 3}, seed_), expected);
  const auto one = frequencies(logits_, {.top_k = 1}, seed_, 100);
  EXPECT_NEAR(one[2], 1, 1e-9) << "a tie goes to the lower id";
}

TEST_F(Sampling, TopPKeepsTheShortestPrefixThatReachesIt) {
  SCOPED_TRACE(testing::Message() << "seed " << seed_);
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  expect_distribution(frequencies(logits, {.top_p = 0.4}, seed_), {0, 1, 0});
  expect_distribution(frequencies(logits, {.top_p = 0.6}, seed_), {0, 0.625, 0.375});
  expect_distribution(frequencies(logits, {.top_p = 0.9}, seed_), {0.2, 0.5, 0.3});
}

TEST_F(Sampling, ZeroTemperatureIsArgmaxAndSeedsRepeat) {
  const auto greedy = frequencies(logits_, {.temperature = 0}, seed_, 10);
  EXPECT_NEAR(greedy[2], 1, 1e-9);
  EXPECT_EQ(frequencies(logits_, {}, seed_, 500), frequencies(logits_, {}, seed_, 500));
  EXPECT_NE(frequencies(logits_, {}, seed_, 500), frequencies(logits_, {}, seed_ + 1, 500));
}

TEST_F(Sampling, RefusesBadOptionsAndBrokenLogits) {
  SamplingRandom random(1);
  const std::vector<float> fine = {0.0f, 1.0f};
  for (const SamplingOptions& options :
       {SamplingOptions{.temperature = -1}, SamplingOptions{.temperature = NAN},
        SamplingOptions{.top_k = -1}, SamplingOptions{.top_p = 0}, SamplingOptions{.top_p = 1.5}}) {
    EXPECT_THROW(sample_token(fine, options, random), std::invalid_argument);
  }
  EXPECT_THROW(sample_token({}, {}, random), std::invalid_argument);
  EXPECT_THROW(sample_token(std::vector<float>{0, NAN}, {}, random), std::invalid_argument);
  EXPECT_THROW(sample_token(std::vector<float>{0, INFINITY}, {}, random), std::invalid_argument);
  EXPECT_THROW(sample_token(std::vector<float>{-INFINITY}, {}, random), std::invalid_argument);
}

}  // namespace
}  // namespace dsv3
