#include "ops/rms_norm.h"

#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include "ops/autograd.h"
#include "support/finite_difference.h"
#include "support/gradients.h"

namespace dsv3 {
namespace {

using test::Named;
constexpr double kEps = 1e-6;

struct Sizes {
  int64_t tokens, hidden, pad;  // pad: extra columns that make the rows strided
};

const Sizes kSizes[] = {{4, 3, 0},     {1, 8, 0},     {3, 7, 0},      {5, 64, 0},   {130, 96, 0},
                        {67, 256, 0},  {33, 1000, 0}, {19, 2048, 24}, {9, 7168, 0}, {70, 511, 1},
                        {40, 512, 64}, {2, 20000, 0}, {1030, 128, 8}, {0, 64, 0},   {300, 1536, 0}};

class RmsNorm : public ::testing::TestWithParam<test::Place> {
 protected:
  /// ATen's usual composition: statistics in FP32, rounding before the weight.
  static at::Tensor composed(const at::Tensor& x, const at::Tensor& weight) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor inv = wide.square().mean(-1, true).add(kEps).rsqrt();
    return wide.mul(inv).to(x.scalar_type()).mul(weight);
  }
};

TEST_P(RmsNorm, ForwardAndGradients) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [T, D, pad] : kSizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << ", D " << D << ", pad " << pad);
    const at::Tensor data = random.normal({T, D + pad}, dtype);
    const at::Tensor w = random.normal({D}, dtype, at::kCPU, 0.3, 1.0);
    const at::Tensor dy = random.normal({T, D}, dtype);
    const auto run = [&](at::ScalarType type, at::Device place, int kind) -> Named {
      const at::Tensor big = test::leaf(data, type, place);
      const at::Tensor x = big.narrow(1, pad / 2, D);
      ops::Weight weight = test::weight_of(w, type, place, kind == 0 ? at::kFloat : type, 0.5);
      at::Tensor y;
      if (kind == 2) {
        y = composed(x, weight.value);
      } else {
        const auto result = ops::rms_norm(x, weight, kEps);
        y = result.value;
        EXPECT_TRUE(test::same_bits(result.remake(), y));
      }
      test::backward({y}, {dy});
      const at::Tensor dw = kind == 2 ? weight.value.grad().add(0.5) : weight.grad;
      EXPECT_EQ(weight.value.grad().defined(), kind == 2);
      return {{"y", y}, {"dx", big.grad()}, {"dweight", dw}};
    };
    const Named ours = run(dtype, device, 0), oracle = run(at::kDouble, at::kCPU, 1);
    test::expect_agree(ours, oracle, dtype == at::kBFloat16 ? run(dtype, device, 2) : Named{});
    const Named again = run(dtype, device, 0);
    for (size_t i = 0; i < ours.size(); ++i) {
      EXPECT_TRUE(test::same_bits(ours[i].second, again[i].second)) << ours[i].first;
    }
  }
}

TEST_P(RmsNorm, AddedResidual) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [T, D, pad] : kSizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << ", D " << D << ", pad " << pad);
    const at::Tensor data = random.normal({T, D + pad}, dtype), r = random.normal({T, D}, dtype);
    const at::Tensor w = random.normal({D}, dtype, at::kCPU, 0.3, 1.0);
    const at::Tensor dy = random.normal({T, D}, dtype), dsum = random.normal({T, D}, dtype);
    const auto run = [&](at::ScalarType type, at::Device place, int kind) -> Named {
      const at::Tensor big = test::leaf(data, type, place), residual = test::leaf(r, type, place);
      const at::Tensor x = big.narrow(1, pad / 2, D);
      ops::Weight weight = test::weight_of(w, type, place, kind == 0 ? at::kFloat : type);
      at::Tensor sum, y;
      if (kind == 2) {
        sum = x.add(residual);
        y = composed(sum, weight.value);
      } else {
        ops::Remakable normalised;
        std::tie(sum, normalised) = ops::add_rms_norm(x, residual, weight, kEps);
        y = normalised.value;
        EXPECT_TRUE(test::same_bits(normalised.remake(), y));
      }
      test::backward({sum, y}, {dsum, dy});
      return {{"sum", sum},
              {"y", y},
              {"dx", big.grad()},
              {"dresidual", residual.grad()},
              {"dweight", kind == 2 ? weight.value.grad() : weight.grad}};
    };
    test::expect_agree(run(dtype, device, 0), run(at::kDouble, at::kCPU, 1),
                       dtype == at::kBFloat16 ? run(dtype, device, 2) : Named{});
  }
}

TEST_P(RmsNorm, TwoNormsOfOneInput) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [T, D, pad] : kSizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << ", D " << D << ", pad " << pad);
    const at::Tensor data = random.normal({T, D + pad}, dtype);
    const at::Tensor w[2] = {random.normal({D}, dtype, at::kCPU, 0.3, 1.0),
                             random.normal({D}, dtype, at::kCPU, 0.5, -1.0)};
    const at::Tensor dy[2] = {random.normal({T, D}, dtype), random.normal({T, D}, dtype)};
    const auto run = [&](at::ScalarType type, at::Device place, int kind) -> Named {
      const at::Tensor big = test::leaf(data, type, place);
      const at::Tensor x = big.narrow(1, pad / 2, D);
      const auto bucket = kind == 0 ? at::kFloat : type;
      ops::Weight weights[2] = {test::weight_of(w[0], type, place, bucket, 0.5),
                                test::weight_of(w[1], type, place, bucket, -0.5)};
      at::Tensor y[2];
      if (kind == 2) {
        for (int i = 0; i < 2; ++i) y[i] = composed(x, weights[i].value);
      } else {
        const auto [first, second] = ops::rms_norm_pair(x, weights[0], weights[1], kEps);
        y[0] = first.value, y[1] = second.value;
        EXPECT_TRUE(test::same_bits(first.remake(), y[0]));
        EXPECT_TRUE(test::same_bits(second.remake(), y[1]));
      }
      test::backward({y[0], y[1]}, {dy[0], dy[1]});
      Named result = {{"y", y[0]}, {"second y", y[1]}, {"dx", big.grad()}};
      for (int i = 0; i < 2; ++i) {
        const double start = i == 0 ? 0.5 : -0.5;
        result.emplace_back(i == 0 ? "dweight" : "second dweight",
                            kind == 2 ? weights[i].value.grad().add(start) : weights[i].grad);
      }
      return result;
    };
    const Named ours = run(dtype, device, 0);
    test::expect_agree(ours, run(at::kDouble, at::kCPU, 1),
                       dtype == at::kBFloat16 ? run(dtype, device, 2) : Named{});
    const Named again = run(dtype, device, 0);
    for (size_t i = 0; i < ours.size(); ++i) {
      EXPECT_TRUE(test::same_bits(ours[i].second, again[i].second)) << ours[i].first;
    }
  }
}

TEST_P(RmsNorm, OneOfTwoNormsMayGoUnusedOrBeFrozen) {
  const auto [device, dtype] = GetParam();
  test::Random random(16);
  const at::Tensor data = random.normal({70, 40}, dtype), g = random.normal({70, 40}, dtype);
  const at::Tensor w = random.normal({40}, dtype), other = random.normal({40}, dtype);
  const at::Tensor x = test::leaf(data, dtype, device), alone_x = test::leaf(data, dtype, device);
  const ops::Weight alone = test::weight_of(w, dtype, device, at::kFloat);
  test::backward({ops::rms_norm(alone_x, alone, kEps).value}, {g});
  const ops::Weight frozen{test::leaf(other, dtype, device), {}};
  const ops::Weight weight = test::weight_of(w, dtype, device, at::kFloat);
  test::backward({ops::rms_norm_pair(x, frozen, weight, kEps).second.value}, {g});
  EXPECT_TRUE(test::close(x.grad(), alone_x.grad(), test::tolerance(dtype)));
  EXPECT_TRUE(test::close(weight.grad, alone.grad, test::tolerance(at::kFloat, 30)));
}

TEST_P(RmsNorm, GradientsAgreeWithDifferences) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const at::Tensor data = random.normal({19, 136}, dtype), dy = random.normal({19, 136}, dtype);
  const at::Tensor w = random.normal({136}, dtype, at::kCPU, 0.3, 1.0);
  const at::Tensor x = test::leaf(data, dtype, device);
  const ops::Weight weight = test::weight_of(w, dtype, device, at::kFloat);
  test::backward({ops::rms_norm(x, weight, kEps).value}, {dy});
  const auto objective = [&](const std::vector<at::Tensor>& in) {
    return ops::reference::rms_norm(in[0], in[1], kEps)
        .mul(dy.to(at::kDouble))
        .sum()
        .item<double>();
  };
  EXPECT_TRUE(test::agrees_with_differences(objective, {data, w}, {x.grad(), weight.grad}, random,
                                            dtype == at::kFloat ? 1e-5 : 2e-2));
}

TEST_P(RmsNorm, OneOutputOfTheSumMayGoUnused) {
  const auto [device, dtype] = GetParam();
  test::Random random(11);
  const at::Tensor x = test::leaf(random.normal({5, 24}, dtype), dtype, device);
  const at::Tensor r = test::leaf(random.normal({5, 24}, dtype), dtype, device);
  const ops::Weight weight = test::weight_of(random.normal({24}, dtype), dtype, device, at::kFloat);
  const at::Tensor g = random.normal({5, 24}, dtype, device);
  {
    auto [sum, y] = ops::add_rms_norm(x, r, weight, kEps);
    test::backward({sum}, {g});
  }
  EXPECT_TRUE(test::same_bits(x.grad(), g));
  EXPECT_TRUE(test::same_bits(r.grad(), g));
  EXPECT_EQ(weight.grad.abs().sum().item<double>(), 0.0);
  x.mutable_grad().reset();
  {
    auto [sum, y] = ops::add_rms_norm(x, r, weight, kEps);
    test::backward({y.value}, {g});
  }
  const at::Tensor plain = test::leaf(x.detach().add(r.detach()), dtype, device);
  test::backward({ops::rms_norm(plain, weight, kEps).value}, {g});
  EXPECT_TRUE(test::same_bits(x.grad(), plain.grad()));
}

TEST_P(RmsNorm, FrozenWeightAndNarrowBucket) {
  const auto [device, dtype] = GetParam();
  test::Random random(12);
  const at::Tensor data = random.normal({200, 40}, dtype), g = random.normal({200, 40}, dtype);
  const at::Tensor w = random.normal({40}, dtype);
  const at::Tensor x = test::leaf(data, dtype, device), frozen_x = test::leaf(data, dtype, device);
  const ops::Weight weight = test::weight_of(w, dtype, device, dtype);
  test::backward({ops::rms_norm(x, weight, kEps).value}, {g});
  test::backward({ops::rms_norm(frozen_x, {weight.value, {}}, kEps).value}, {g});
  EXPECT_TRUE(test::same_bits(x.grad(), frozen_x.grad()));
  const at::Tensor wide_x = test::leaf(data, at::kDouble);
  const ops::Weight wide = test::weight_of(w, at::kDouble, at::kCPU, at::kDouble);
  test::backward({ops::rms_norm(wide_x, wide, kEps).value}, {g});
  EXPECT_TRUE(test::close(weight.grad, wide.grad, test::tolerance(dtype, 30)));
}

TEST_P(RmsNorm, OneColumnIsTheSign) {
  const auto [device, dtype] = GetParam();
  test::Random random(15);
  const at::Tensor x = test::leaf(random.normal({70, 1}, dtype, at::kCPU, 0.1, 1.0), dtype, device);
  const ops::Weight weight = test::weight_of(random.normal({1}, dtype), dtype, device, at::kFloat);
  const at::Tensor y = ops::rms_norm(x, weight, kEps).value;
  test::backward({y}, {random.normal({70, 1}, dtype)});
  EXPECT_TRUE(test::close(y, weight.value.expand({70, 1}), 1e-2));
  EXPECT_LT(x.grad().abs().max().item<double>(), 1e-4);
}

TEST_P(RmsNorm, NothingIsRecordedWithoutNeed) {
  const auto [device, dtype] = GetParam();
  test::Random random(13);
  const at::Tensor x = random.normal({4, 16}, dtype, device);
  const ops::Weight weight{random.normal({16}, dtype, device), {}};
  EXPECT_FALSE(ops::rms_norm(x, weight, kEps).value.requires_grad());
  const ops::NoRecord guard;
  EXPECT_FALSE(ops::rms_norm(x, test::weight_of(weight.value, dtype, device, dtype), kEps)
                   .value.requires_grad());
}

TEST(RmsNormErrors, NameTheArgument) {
  test::Random random(14);
  const at::Tensor x = random.normal({4, 16}, at::kFloat);
  try {
    ops::rms_norm(x, {random.normal({8}, at::kFloat), {}}, kEps);
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "[rms_norm] weight: expected shape [16], got [8]");
  }
  EXPECT_THROW(ops::rms_norm(x, {random.normal({16}, at::kBFloat16), {}}, kEps),
               std::invalid_argument);
  EXPECT_THROW(ops::add_rms_norm(x, x.narrow(0, 0, 3), {random.normal({16}, at::kFloat), {}}, kEps),
               std::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(Places, RmsNorm, ::testing::ValuesIn(test::places()), test::place_name);

}  // namespace
}  // namespace dsv3
