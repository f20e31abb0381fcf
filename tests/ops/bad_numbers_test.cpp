// The two kernels behind a skipped step: the decision and the search for what was bad.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/optimizer.h"
#include "ops/dispatch.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3::ops {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

class BadNumbersTest : public testing::TestWithParam<at::Device> {
 protected:
  at::TensorOptions options(at::ScalarType type) const {
    return at::TensorOptions(type).device(GetParam());
  }
};
INSTANTIATE_TEST_SUITE_P(Devices, BadNumbersTest, testing::ValuesIn(test::devices()),
                         [](const auto& info) {
                           return std::string(info.param.is_cuda() ? "cuda" : "cpu");
                         });

TEST_P(BadNumbersTest, TheDecisionFollowsNormLossesAndLimit) {
  struct Case {
    bool bad_norm;
    std::vector<double> losses;
    double limit;
    int skip;
  };
  const std::vector<Case> cases{{false, {}, 0, 0},
                                {true, {}, kInfinity, kernels::kSkipNotFinite},
                                {true, {4.0}, kInfinity, kernels::kSkipNotFinite},
                                {false, {4.0, 3.0}, kInfinity, 0},
                                {false, {4.0, kNan}, 0, kernels::kSkipNotFinite},
                                {false, {-kInfinity}, kInfinity, kernels::kSkipNotFinite},
                                {false, {4.0}, 2.0, 0},
                                {false, {4.0}, std::nextafter(2.0, 0.0), kernels::kSkipSpike}};
  for (const Case& c : cases) {
    for (const int64_t before : {0, 1, 41}) {
      const at::Tensor losses = at::tensor(c.losses, at::kDouble).to(GetParam());
      const at::Tensor updates = at::full({1}, before, options(at::kLong));
      const at::Tensor corrections = at::zeros({2}, options(at::kFloat));
      const at::Tensor skip = at::full({}, c.bad_norm ? 1 : 0, options(at::kInt));
      kernels::decide_step({.num_losses = static_cast<int32_t>(c.losses.size()),
                            .losses = losses.const_data_ptr<double>(),
                            .loss_scale = 0.5,
                            .loss_limit = c.limit,
                            .beta1 = 0.9,
                            .beta2 = 0.95,
                            .updates = updates.mutable_data_ptr<int64_t>(),
                            .corrections = corrections.mutable_data_ptr<float>(),
                            .skip = skip.mutable_data_ptr<int32_t>()},
                           stream_of(skip));
      EXPECT_EQ(skip.item<int>(), c.skip);
      const int64_t after = before + (c.skip == 0 ? 1 : 0);
      EXPECT_EQ(updates.item<int64_t>(), after);
      const double count = static_cast<double>(std::max<int64_t>(1, after));
      EXPECT_FLOAT_EQ(corrections[0].item<float>(), static_cast<float>(1 - std::pow(0.9, count)));
      EXPECT_FLOAT_EQ(corrections[1].item<float>(), static_cast<float>(1 - std::pow(0.95, count)));
    }
  }
}

struct Found {
  at::Tensor counts, first;
};

TEST_P(BadNumbersTest, EveryBadNumberIsCountedInItsRange) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const int64_t size :
         {int64_t{0}, int64_t{1}, int64_t{128}, int64_t{5001}, int64_t{70000}}) {
      std::vector<int64_t> starts{0};
      while (starts.back() + 128 < size)
        starts.push_back(starts.back() + 128 * random.integer(1, 9));
      if (starts.back() >= size && starts.size() > 1) starts.pop_back();
      const auto ranges = static_cast<int64_t>(starts.size());
      at::Tensor host = random.normal({size}, at::kFloat, at::kCPU);
      std::vector<int64_t> counts(starts.size(), 0), first(starts.size(), 1'000'000);
      for (int64_t i = 0; i < size; ++i) {
        if (random.integer(0, 299) != 0) continue;
        const double bad[] = {kNan, kInfinity, -kInfinity};
        host.data_ptr<float>()[i] = static_cast<float>(bad[random.integer(0, 2)]);
        const auto r =
            static_cast<size_t>(std::ranges::upper_bound(starts, i) - starts.begin() - 1);
        ++counts[r];
        first[r] = std::min(first[r], i - starts[r]);
      }
      const at::Tensor x = host.to(type).to(GetParam());
      const at::Tensor begins = at::tensor(starts, at::kLong).to(GetParam());
      for (const int flag : {0, 1, 2}) {
        const at::Tensor only_if = at::full({}, flag, options(at::kInt));
        const Found found{at::zeros({ranges}, options(at::kLong)),
                          at::full({ranges}, 1'000'000, options(at::kLong))};
        kernels::locate_non_finite({.size = size,
                                    .dtype = dtype_of(x, "locate_non_finite", "x"),
                                    .x = x.const_data_ptr(),
                                    .num_ranges = ranges,
                                    .starts = begins.const_data_ptr<int64_t>(),
                                    .only_if = only_if.const_data_ptr<int32_t>(),
                                    .counts = found.counts.mutable_data_ptr<int64_t>(),
                                    .first = found.first.mutable_data_ptr<int64_t>()},
                                   stream_of(x));
        if (flag == 0) {
          EXPECT_EQ(found.counts.sum().item<int64_t>(), 0) << "read although nothing was asked";
          continue;
        }
        EXPECT_TRUE(test::same_bits(found.counts.cpu(), at::tensor(counts, at::kLong)));
        EXPECT_TRUE(test::same_bits(found.first.cpu(), at::tensor(first, at::kLong)));
      }
    }
  }
}

}  // namespace
}  // namespace dsv3::ops
