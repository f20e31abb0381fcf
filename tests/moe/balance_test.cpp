#include "moe/balance.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>

#include "support/compare.h"

namespace dsv3 {
namespace {

const auto kFloats = at::TensorOptions(at::kFloat);
const auto kInts = at::TensorOptions(at::kInt);

TEST(Balance, BiasMovesAgainstTheLoadByTheRate) {
  at::Tensor bias = at::tensor({0.5f, -0.25f, 0.0f, 1.0f}, kFloats);
  update_router_bias(bias, at::tensor({10, 2, 6, 6}, kInts), 0.001, {});  // mean 6
  const at::Tensor expected = at::tensor({0.499f, -0.249f, 0.0f, 1.0f}, kFloats);
  EXPECT_TRUE(bias.allclose(expected, 0, 1e-7));
}

TEST(Balance, AnExpertWithoutTokensGainsBias) {
  at::Tensor bias = at::zeros({3}, kFloats);
  update_router_bias(bias, at::tensor({0, 9, 0}, kInts), 0.01, {});
  EXPECT_TRUE(bias.allclose(at::tensor({0.01f, -0.01f, 0.01f}, kFloats), 0, 1e-7));
}

// Large loads: the mean must not be rounded to FP32, or equal experts would drift apart.
TEST(Balance, EqualLargeLoadsLeaveTheBiasAlone) {
  at::Tensor bias = at::zeros({3}, kFloats);
  update_router_bias(bias, at::tensor({16777217, 16777217, 16777217}, kInts), 0.01, {});
  EXPECT_TRUE(bias.equal(at::zeros({3}, kFloats)));
}

TEST(Balance, ASkippedStepLeavesEveryBit) {
  const at::Tensor before = at::tensor({0.5f, -0.0f, 0.0f, -1e-40f}, kFloats);
  for (const int skip : {0, 1, 2}) {
    at::Tensor bias = before.clone();
    update_router_bias(bias, at::tensor({0, 2, 9, 1}, kInts), 0.001,
                       at::full({}, skip, at::TensorOptions(at::kInt)));
    EXPECT_EQ(test::same_bits(bias, before), skip != 0) << skip;
  }
}

TEST(Balance, WrongShapeIsNamed) {
  at::Tensor bias = at::zeros({3}, kFloats);
  EXPECT_THROW(update_router_bias(bias, at::tensor({1, 2}, kInts), 0.01, {}),
               std::invalid_argument);
}

}  // namespace
}  // namespace dsv3
