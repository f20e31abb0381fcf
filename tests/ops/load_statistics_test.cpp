#include "ops/load_statistics.h"

#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "support/compare.h"
#include "support/random.h"

namespace dsv3 {
namespace {

using Row = std::vector<double>;

/// The formulas of kernels/routing.h, number by number.
Row plain(const Row& loads, double micro_violation, const Row& bias) {
  const auto experts = static_cast<double>(loads.size());
  const double total = std::accumulate(loads.begin(), loads.end(), 0.0);
  const double spread = bias.empty() ? 0
                                     : *std::max_element(bias.begin(), bias.end()) -
                                           *std::min_element(bias.begin(), bias.end());
  if (total == 0) return {0, micro_violation, 0, 0, 0, spread};
  const double mean = total / experts;
  double variance = 0, entropy = 0, used = 0;
  for (const double n : loads) {
    variance += (n - mean) * (n - mean) / experts;
    if (n > 0) entropy -= n / total * std::log(n / total);
    used += n > 0;
  }
  return {*std::max_element(loads.begin(), loads.end()) / mean - 1,
          micro_violation,
          std::sqrt(variance) / mean,
          loads.size() == 1 ? 1.0 : entropy / std::log(experts),
          used / experts,
          spread};
}

Row row_of(const at::Tensor& values) {
  const at::Tensor host = values.to(at::kCPU, at::kDouble).contiguous();
  return {host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel()};
}

class LoadStatisticsTest : public testing::TestWithParam<at::Device> {
 protected:
  at::Tensor statistics(const std::vector<at::Tensor>& micro_batches,
                        const std::vector<at::Tensor>& biases) {
    load_ = {};
    for (const auto& counts : micro_batches) ops::add_load(load_, counts.to(GetParam()));
    std::vector<at::Tensor> placed;
    for (const auto& bias : biases)
      placed.push_back(bias.defined() ? bias.to(GetParam(), at::kFloat) : bias);
    return ops::load_statistics(load_, placed).to(at::kCPU);
  }

  uint64_t seed_ = test::fresh_seed();
  test::Random random_{seed_};
  ops::Load load_;
};

TEST_P(LoadStatisticsTest, FollowsTheFormulasOnRandomLoads) {
  SCOPED_TRACE(test::seed_text(seed_));
  for (const int64_t layers : {1, 3, 63, 64, 65, 130}) {
    for (const int64_t experts : {1, 2, 31, 64, 257, 512}) {
      std::vector<at::Tensor> micro_batches, biases;
      for (int i = 0; i < 3; ++i) {
        // Every second count is 0; whole layers too, now and then.
        at::Tensor counts = random_.integers({layers, experts}, 1000);
        counts.mul_(random_.integers({layers, experts}, 2)).mul_(random_.integers({layers, 1}, 3));
        micro_batches.push_back(counts);
      }
      for (int64_t layer = 0; layer < layers; ++layer)
        biases.push_back(layer % 3 == 1 ? at::Tensor() : random_.normal({experts}, at::kFloat));
      const at::Tensor found = statistics(micro_batches, biases);
      const at::Tensor total = at::stack(micro_batches).sum(0);
      EXPECT_TRUE(test::same_bits(load_.tokens.to(at::kCPU), total.to(at::kLong)));
      for (int64_t layer = 0; layer < layers; ++layer) {
        double micro = 0;
        for (const auto& counts : micro_batches)
          micro += plain(row_of(counts[layer]), 0, {})[0] / 3;
        const auto& bias = biases[static_cast<size_t>(layer)];
        const Row expected =
            plain(row_of(total[layer]), micro, bias.defined() ? row_of(bias) : Row{});
        const Row actual = row_of(found[layer]);
        for (size_t i = 0; i < expected.size(); ++i)
          ASSERT_NEAR(actual[i], expected[i], 1e-12 * std::max(1.0, std::abs(expected[i])))
              << "layer " << layer << " of " << layers << ", " << experts << " experts, column "
              << i;
      }
    }
  }
}

TEST_P(LoadStatisticsTest, KnownLoads) {
  const at::Tensor none = at::zeros({4}, at::kInt), even = at::tensor({5, 5, 5, 5}, at::kInt),
                   one = at::tensor({0, 0, 12, 0}, at::kInt);
  const at::Tensor bias = at::tensor({-1.0, 0.5, 0.25, 0.0});
  const auto found = statistics({at::stack({none, even, one})}, {bias, at::Tensor(), bias});
  using namespace kernels;
  const auto value = [&found](int64_t layer, LoadStatistic which) {
    return found[layer][which].item<double>();
  };
  for (const auto which : {kMaxViolation, kMicroViolation, kLoadImbalance, kEntropy, kUtilization})
    EXPECT_EQ(value(0, which), 0.0) << "nothing was routed, column " << which;
  EXPECT_EQ(value(0, kBiasSpread), 1.5);
  EXPECT_EQ(value(1, kMaxViolation), 0.0);
  EXPECT_EQ(value(1, kLoadImbalance), 0.0);
  EXPECT_NEAR(value(1, kEntropy), 1.0, 1e-15);
  EXPECT_EQ(value(1, kUtilization), 1.0);
  EXPECT_EQ(value(1, kBiasSpread), 0.0);
  EXPECT_EQ(value(2, kMaxViolation), 3.0) << "one expert takes all: E - 1";
  EXPECT_EQ(value(2, kMicroViolation), 3.0);
  EXPECT_NEAR(value(2, kLoadImbalance), std::sqrt(3.0), 1e-15) << "√(E - 1)";
  EXPECT_EQ(value(2, kEntropy), 0.0);
  EXPECT_EQ(value(2, kUtilization), 0.25);
}

TEST_P(LoadStatisticsTest, MicroBatchesThatBalanceEachOtherViolateOnlyByThemselves) {
  const at::Tensor first = at::tensor({8, 0}, at::kInt).unsqueeze(0);
  const at::Tensor second = at::tensor({0, 8}, at::kInt).unsqueeze(0);
  const auto found = statistics({first, second}, {at::Tensor()});
  EXPECT_EQ(found[0][kernels::kMaxViolation].item<double>(), 0.0);
  EXPECT_EQ(found[0][kernels::kMicroViolation].item<double>(), 1.0);
}

TEST_P(LoadStatisticsTest, RefusesWhatDoesNotFit) {
  ops::Load load;
  ops::add_load(load, at::zeros({2, 4}, at::TensorOptions(at::kInt).device(GetParam())));
  EXPECT_THROW(
      ops::add_load(load, at::zeros({2, 5}, at::TensorOptions(at::kInt).device(GetParam()))),
      std::invalid_argument);
  EXPECT_THROW(
      ops::add_load(load, at::zeros({2, 4}, at::TensorOptions(at::kLong).device(GetParam()))),
      std::invalid_argument);
  EXPECT_THROW(ops::load_statistics(load, {at::Tensor()}), std::invalid_argument);
  EXPECT_THROW(ops::load_statistics({}, {}), std::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(Devices, LoadStatisticsTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) { return info.param.is_cuda() ? "cuda" : "cpu"; });

}  // namespace
}  // namespace dsv3
