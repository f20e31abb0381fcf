#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <vector>

#include "mla/mla.h"

namespace dsv3 {
namespace {

RopeConfig yarn(double theta, double factor, int64_t length, double mscale, double all_dim) {
  RopeConfig rope;
  rope.type = RopeConfig::Type::kYarn;
  rope.theta = theta;
  rope.factor = factor;
  rope.original_max_position_embeddings = length;
  rope.mscale = mscale;
  rope.mscale_all_dim = all_dim;
  return rope;
}

/// Radians per position of each pair, read back from row 1; and the amplitude.
std::vector<double> angles(const at::Tensor& table, double* amplitude) {
  const auto* row = table.const_data_ptr<float>() + table.size(1);
  std::vector<double> result;
  for (int64_t i = 0; i < table.size(1); i += 2) {
    result.push_back(std::atan2(row[i + 1], row[i]));
    *amplitude = std::hypot(row[i + 1], row[i]);
  }
  return result;
}

void expect_angles(const RopeConfig& rope, const std::vector<double>& want, double amplitude) {
  double got_amplitude = 0;
  const auto got =
      angles(rope_table(rope, static_cast<int64_t>(want.size()) * 2, 2), &got_amplitude);
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_NEAR(got[i] / want[i], 1.0, 1e-6) << "pair " << i;
  }
  EXPECT_NEAR(got_amplitude, amplitude, 1e-6);
}

TEST(Rope, WithoutScalingItIsTheFormula) {
  RopeConfig rope;
  rope.theta = 500.0;
  const auto table = rope_table(rope, 6, 40);
  ASSERT_EQ(table.size(0), 40);
  for (int64_t position = 0; position < 40; ++position) {
    const auto* row = table.const_data_ptr<float>() + position * 6;
    for (int64_t pair = 0; pair < 3; ++pair) {
      const double angle =
          static_cast<double>(position) / std::pow(500.0, static_cast<double>(pair) / 3.0);
      EXPECT_NEAR(row[2 * pair], std::cos(angle), 1e-7);
      EXPECT_NEAR(row[2 * pair + 1], std::sin(angle), 1e-7);
    }
  }
}

// The frequencies below are those of transformers' DeepseekV3 (FP32).
TEST(Rope, YarnOfTheReleasedWeights) {
  const auto rope = yarn(10000, 40, 4096, 1, 1);
  expect_angles(rope,
                {1.0,
                 0.749894202,
                 0.562341332,
                 0.421696514,
                 0.316227764,
                 0.237137362,
                 0.177827939,
                 0.133352146,
                 0.100000001,
                 0.0749894157,
                 0.0562341288,
                 0.0390069261,
                 0.0268793609,
                 0.0183781441,
                 0.012447956,
                 0.0083345091,
                 0.00550000044,
                 0.00356199732,
                 0.00224936521,
                 0.00137051346,
                 0.000790569407,
                 0.000414990413,
                 0.00017782794,
                 3.3338034e-05,
                 2.49999994e-05,
                 1.87473543e-05,
                 1.40585325e-05,
                 1.05424124e-05,
                 7.90569447e-06,
                 5.92843435e-06,
                 4.44569832e-06,
                 3.33380353e-06},
                1.0);
  // The correction range is pairs 10 to 23: up to 10 untouched, from 23 on slowed by the factor.
  RopeConfig plain = rope;
  plain.type = RopeConfig::Type::kNone;
  double unused = 0;
  const auto stretched = angles(rope_table(rope, 64, 2), &unused);
  const auto original = angles(rope_table(plain, 64, 2), &unused);
  EXPECT_NEAR(stretched[10] / original[10], 1.0, 1e-6);
  EXPECT_LT(stretched[11] / original[11], 0.95);
  EXPECT_GT(stretched[22] / original[22], 1.05 / 40);
  EXPECT_NEAR(stretched[23] / original[23], 1.0 / 40, 1e-7);
}

TEST(Rope, YarnWithUnequalTemperatures) {
  const std::vector<double> want{1.0,
                                 0.508527458,
                                 0.258600146,
                                 0.131505266,
                                 0.0585147813,
                                 0.0255054571,
                                 0.010808521,
                                 0.00439714314,
                                 0.00167705107,
                                 0.000568550953,
                                 0.000289123738,
                                 0.000147027356,
                                 7.47674421e-05,
                                 3.80212914e-05,
                                 1.93348696e-05,
                                 9.83231166e-06};
  expect_angles(yarn(50000, 4, 2048, 0.707, 1.0), want, 0.964326914892);
  expect_angles(yarn(50000, 4, 2048, 0.0, 0.0), want, 1.138629436112);
}

TEST(Rope, YarnWithAShortContextAndOtherRotations) {
  auto rope = yarn(10000, 8, 64, 1, 1);
  rope.beta_fast = 8;
  rope.beta_slow = 2;
  expect_angles(rope,
                {1.0, 0.177878112, 0.0125000002, 0.00395284733, 0.00124999997, 0.000395284733,
                 0.000125000006, 3.95284733e-05},
                1.0);
}

TEST(Rope, SoftmaxScaleTakesTheTemperatureSquared) {
  ModelConfig config;
  config.mla.qk_nope_head_dim = 128;
  config.mla.qk_rope_head_dim = 64;
  EXPECT_NEAR(softmax_scale(config), 0.0721687836, 1e-9);
  config.rope = yarn(10000, 40, 4096, 1, 1);
  EXPECT_NEAR(softmax_scale(config), 0.1352337788608801, 1e-12);
  EXPECT_NEAR(softmax_scale(config) * std::sqrt(192.0), 1.87385, 1e-5);
  config.rope.mscale_all_dim = 0.0;
  EXPECT_NEAR(softmax_scale(config), 0.0721687836, 1e-9);
  config.rope = yarn(10000, 1, 4096, 1, 1);
  EXPECT_NEAR(softmax_scale(config), 0.0721687836, 1e-9);
}

TEST(Rope, RefusesOddWidths) {
  EXPECT_THROW(rope_table({}, 7, 4), std::invalid_argument);
  EXPECT_THROW(rope_table({}, 8, -1), std::invalid_argument);
  EXPECT_EQ(rope_table({}, 8, 0).numel(), 0);
}

}  // namespace
}  // namespace dsv3
