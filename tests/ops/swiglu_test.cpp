#include "ops/swiglu.h"

#include <ATen/ops/silu.h>
#include <gtest/gtest.h>

#include <limits>

#include "support/finite_difference.h"
#include "support/gradients.h"

namespace dsv3 {
namespace {

using test::Named;

class Swiglu : public ::testing::TestWithParam<test::Place> {};

TEST_P(Swiglu, ForwardAndGradients) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const std::pair<int64_t, int64_t> sizes[] = {{1, 1},    {3, 5},   {1, 64},   {129, 96},
                                               {17, 704}, {40, 33}, {5, 2048}, {2, 18432},
                                               {0, 16},   {1000, 8}};
  for (const auto& [T, I] : sizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << ", I " << I);
    const at::Tensor data = random.normal({T, 2 * I}, dtype, at::kCPU, 3.0);
    const at::Tensor dy = random.normal({T, I}, dtype);
    const auto run = [&, I = I](at::ScalarType type, at::Device place, int kind) -> Named {
      const at::Tensor x = test::leaf(data, type, place);
      at::Tensor y;
      if (kind == 2) {
        y = at::silu(x.narrow(1, 0, I)).mul(x.narrow(1, I, I));
      } else {
        const auto result = ops::swiglu(x);
        y = result.value;
        EXPECT_TRUE(test::same_bits(result.remake(), y));
      }
      test::backward({y}, {dy});
      return {{"y", y}, {"dgate_up", x.grad()}};
    };
    const Named ours = run(dtype, device, 0);
    test::expect_agree(ours, run(at::kDouble, at::kCPU, 1),
                       dtype == at::kBFloat16 ? run(dtype, device, 2) : Named{});
    EXPECT_TRUE(test::same_bits(ours[1].second, run(dtype, device, 0)[1].second));
  }
}

TEST_P(Swiglu, RoutingWeightAndItsGradient) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const std::pair<int64_t, int64_t> sizes[] = {{1, 1},    {3, 5},   {1, 64},   {129, 96},
                                               {17, 704}, {40, 33}, {5, 2048}, {2, 18432},
                                               {0, 16},   {1000, 8}};
  for (const auto& [T, I] : sizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << ", I " << I);
    const at::Tensor data = random.normal({T, 2 * I}, dtype, at::kCPU, 3.0);
    const at::Tensor weights = random.normal({T}, at::kFloat, at::kCPU, 0.3, 0.5);
    const at::Tensor dy = random.normal({T, I}, dtype);
    const auto run = [&, I = I](at::ScalarType type, at::Device place, int kind) -> Named {
      const at::Tensor x = test::leaf(data, type, place);
      const auto wide = type == at::kDouble ? at::kDouble : at::kFloat;
      const at::Tensor w = test::leaf(weights, wide, place);
      at::Tensor y;
      if (kind == 2) {
        y = at::silu(x.narrow(1, 0, I)).mul(x.narrow(1, I, I)).mul(w.unsqueeze(1).to(type));
      } else {
        const auto result = ops::weighted_swiglu(x, w);
        y = result.value;
        EXPECT_TRUE(test::same_bits(result.remake(), y));
      }
      test::backward({y}, {dy});
      return {{"y", y}, {"dgate_up", x.grad()}, {"drow_weight", w.grad()}};
    };
    Named ours = run(dtype, device, 0), oracle = run(at::kDouble, at::kCPU, 1);
    // A row's terms may cancel.
    const at::Tensor wide = data.to(at::kDouble);
    const at::Tensor terms = ops::reference::swiglu(wide).mul(dy.to(at::kDouble)).abs().sum(1);
    EXPECT_TRUE(test::close_to_terms(ours[2].second, oracle[2].second, terms,
                                     test::tolerance(at::kFloat, 30)));
    const Named kept = ours;
    ours.pop_back();
    oracle.pop_back();
    test::expect_agree(ours, oracle, dtype == at::kBFloat16 ? run(dtype, device, 2) : Named{});
    for (int repeat = 1; repeat < 10; ++repeat) {
      const Named again = run(dtype, device, 0);
      for (size_t i = 0; i < kept.size(); ++i) {
        EXPECT_TRUE(test::same_bits(kept[i].second, again[i].second)) << kept[i].first;
      }
    }
  }
}

TEST_P(Swiglu, GradientsAgreeWithDifferences) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const at::Tensor data = random.normal({23, 2 * 40}, dtype), dy = random.normal({23, 40}, dtype);
  const at::Tensor weights = random.normal({23}, at::kFloat);
  const at::Tensor x = test::leaf(data, dtype, device);
  const at::Tensor w = test::leaf(weights, at::kFloat, device);
  test::backward({ops::weighted_swiglu(x, w).value}, {dy});
  const auto objective = [&](const std::vector<at::Tensor>& in) {
    return ops::reference::swiglu(in[0], in[1]).mul(dy.to(at::kDouble)).sum().item<double>();
  };
  EXPECT_TRUE(test::agrees_with_differences(objective, {data, weights}, {x.grad(), w.grad()},
                                            random, dtype == at::kFloat ? 1e-5 : 2e-2));
}

TEST_P(Swiglu, FarGatesNeitherOverflowNorVanish) {
  const auto [device, dtype] = GetParam();
  const double infinity = std::numeric_limits<double>::infinity();
  const std::vector<double> gates = {-1e4, -104.0, -89.0, -88.0, -87.0, -20.0, -1e-6, 0.0,
                                     1e-6, 20.0,   87.0,  89.0,  104.0, 1e4,   3e38,  -3e38};
  for (const double gate : gates) {
    at::Tensor data = test::Random(1).normal({1, 2}, dtype, device);
    data.select(1, 0).fill_(gate);
    data.select(1, 1).fill_(1.0);
    const at::Tensor x = test::leaf(data, dtype, device);
    const at::Tensor wide = test::leaf(x, at::kDouble);
    const at::Tensor y = ops::swiglu(x).value;
    const at::Tensor expected = ops::reference::swiglu(wide);
    y.sum().backward();
    expected.sum().backward();
    // Absolute, because far below -87 silu is smaller than FP32's normal numbers.
    EXPECT_NEAR(y.item<double>(), expected.item<double>(),
                1e-2 * std::abs(expected.item<double>()) + 1e-35);
    for (int i = 0; i < 2; ++i) {
      const double g = x.grad().select(1, i).item<double>();
      const double e = wide.grad().select(1, i).item<double>();
      EXPECT_NEAR(g, e, 1e-2 * std::abs(e) + 1e-35) << "gate " << gate << " part " << i;
      EXPECT_LT(std::abs(g), infinity);
    }
  }
}

TEST_P(Swiglu, NotANumberStays) {
  const auto [device, dtype] = GetParam();
  at::Tensor x = test::Random(2).normal({1, 64}, dtype, device);
  x.select(1, 3).fill_(std::numeric_limits<double>::quiet_NaN());
  const at::Tensor y = ops::swiglu(x).value;
  EXPECT_EQ(y.isnan().sum().item<int64_t>(), 1);
}

TEST(SwigluErrors, RowWeight) {
  test::Random random(3);
  const at::Tensor x = random.normal({2, 8}, at::kBFloat16);
  try {
    ops::weighted_swiglu(x, random.normal({3}, at::kFloat));
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "[weighted_swiglu] row_weight: expected shape [2], got [3]");
  }
  EXPECT_THROW(ops::weighted_swiglu(x, random.normal({2}, at::kBFloat16)), std::invalid_argument);
  EXPECT_THROW(ops::weighted_swiglu(x, at::Tensor()), std::invalid_argument);
}

TEST(SwigluErrors, OddWidth) {
  EXPECT_THROW(ops::swiglu(test::Random(3).normal({2, 7}, at::kFloat)), std::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(Places, Swiglu, ::testing::ValuesIn(test::places()), test::place_name);

}  // namespace
}  // namespace dsv3
