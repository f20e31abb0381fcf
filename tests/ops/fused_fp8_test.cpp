// Norm and SwiGLU that leave in FP8: the bits of the operator and the quantiser in turn, and the
// same gradients.
#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "ops/rms_norm.h"
#include "ops/rms_norm_fp8.h"
#include "ops/swiglu.h"
#include "ops/swiglu_fp8.h"
#include "support/gradients.h"

namespace dsv3 {
namespace {

constexpr double kEps = 1e-6;

template <typename Tiles>
void expect_same(const Tiles& actual, const Tiles& expected) {
  ASSERT_TRUE(actual.data.defined());
  EXPECT_TRUE(test::same_bits(actual.data.view(at::kByte), expected.data.view(at::kByte)));
  EXPECT_TRUE(test::same_bits(actual.scales, expected.scales));
}

class FusedFp8 : public ::testing::TestWithParam<test::Place> {};

struct NormSizes {
  int64_t tokens, hidden, pad;
};
const NormSizes kNormSizes[] = {{1, 1, 0},    {1, 128, 0},   {3, 7, 0},      {37, 96, 0},
                                {67, 256, 0}, {33, 1000, 0}, {19, 2048, 24}, {9, 7168, 0},
                                {70, 511, 1}, {2, 33000, 0}, {0, 64, 0},     {130, 1536, 8},
                                {5, 1160, 0}, {3, 20000, 0}};

TEST_P(FusedFp8, NormIsNormThenQuantisation) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [T, D, pad] : kNormSizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << ", D " << D << ", pad " << pad);
    const at::Tensor data = random.normal({T, D + pad}, dtype), dy = random.normal({T, D}, dtype);
    const at::Tensor w = random.normal({D}, dtype, at::kCPU, 0.3, 1.0);
    const at::Tensor plain_big = test::leaf(data, dtype, device);
    const ops::Weight plain_weight = test::weight_of(w, dtype, device, at::kFloat);
    const at::Tensor y = ops::rms_norm(plain_big.narrow(1, pad / 2, D), plain_weight, kEps).value;
    test::backward({y}, {dy});
    for (const bool keep : {false, true}) {
      const ops::QuantizeOptions options{.power_of_two = keep};
      const at::Tensor big = test::leaf(data, dtype, device);
      const ops::Weight weight = test::weight_of(w, dtype, device, at::kFloat);
      const auto fused = ops::rms_norm_fp8(big.narrow(1, pad / 2, D), weight, kEps, options, keep);
      expect_same(fused.tiles, ops::quantize_rows(y, options));
      if (keep) {
        EXPECT_TRUE(test::same_bits(fused.y, y));
      }
      EXPECT_EQ(fused.y.sizes(), y.sizes());
      fused.y.backward(dy.to(device));
      EXPECT_TRUE(test::same_bits(big.grad(), plain_big.grad()));
      EXPECT_TRUE(test::same_bits(weight.grad, plain_weight.grad));
    }
  }
}

TEST_P(FusedFp8, NormWithResidual) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [T, D, pad] : kNormSizes) {
    SCOPED_TRACE(::testing::Message() << "T " << T << ", D " << D);
    const at::Tensor data = random.normal({T, D}, dtype), r = random.normal({T, D}, dtype);
    const at::Tensor w = random.normal({D}, dtype, at::kCPU, 0.3, 1.0);
    const at::Tensor dy = random.normal({T, D}, dtype, device);
    const at::Tensor dsum = random.normal({T, D}, dtype, device);
    const at::Tensor plain_x = test::leaf(data, dtype, device);
    const at::Tensor residual = test::leaf(r, dtype, device);
    const ops::Weight plain_weight = test::weight_of(w, dtype, device, at::kFloat);
    const auto [plain_sum, plain] = ops::add_rms_norm(plain_x, residual, plain_weight, kEps);
    test::backward({plain_sum, plain.value}, {dsum, dy});
    const at::Tensor x = test::leaf(data, dtype, device);
    const ops::Weight weight = test::weight_of(w, dtype, device, at::kFloat);
    const auto [sum, fused] = ops::add_rms_norm_fp8(x, residual, weight, kEps, {}, true);
    EXPECT_TRUE(test::same_bits(sum, plain_sum));
    EXPECT_TRUE(test::same_bits(fused.y, plain.value));
    expect_same(fused.tiles, ops::quantize_rows(plain.value, {}));
    test::backward({sum, fused.y}, {dsum, dy});
    EXPECT_TRUE(test::same_bits(x.grad(), plain_x.grad()));
    EXPECT_TRUE(test::same_bits(weight.grad, plain_weight.grad));
  }
}

const std::pair<int64_t, int64_t> kSwigluSizes[] = {{1, 1},    {3, 5},     {1, 128},   {129, 96},
                                                    {17, 704}, {40, 33},   {5, 2048},  {257, 256},
                                                    {0, 128},  {130, 640}, {128, 128}, {64, 1000}};

TEST_P(FusedFp8, SwigluIsSwigluThenQuantisation) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [T, I] : kSwigluSizes) {
    const at::Tensor data = random.normal({T, 2 * I}, dtype, at::kCPU, 3.0);
    const at::Tensor dy = random.normal({T, I}, dtype, device);
    for (int form = 0; form < 6; ++form) {
      const bool weighted = form % 2 == 1;
      SCOPED_TRACE(::testing::Message() << "T " << T << ", I " << I << ", form " << form);
      const ops::SwigluFp8Options options{.quantize = {.power_of_two = weighted},
                                          .rows = form / 2 != 1,
                                          .columns = form / 2 != 0,
                                          .keep = weighted};
      at::Tensor plain_w, w;
      if (weighted) {
        plain_w = test::leaf(random.normal({T}, at::kFloat), at::kFloat, device);
        w = test::leaf(plain_w, at::kFloat, device);
      }
      const at::Tensor plain_x = test::leaf(data, dtype, device);
      const at::Tensor y =
          (weighted ? ops::weighted_swiglu(plain_x, plain_w) : ops::swiglu(plain_x)).value;
      y.backward(dy);
      const at::Tensor x = test::leaf(data, dtype, device);
      const auto fused = ops::swiglu_fp8(x, w, options);
      if (options.rows) expect_same(fused.rows, ops::quantize_rows(y, options.quantize));
      if (options.columns) expect_same(fused.columns, ops::quantize_columns(y, options.quantize));
      if (options.keep) {
        EXPECT_TRUE(test::same_bits(fused.y, y));
      }
      fused.y.backward(dy);
      EXPECT_TRUE(test::same_bits(x.grad(), plain_x.grad()));
      if (weighted) {
        EXPECT_TRUE(test::same_bits(w.grad(), plain_w.grad()));
      }

      const auto back = ops::swiglu_gradient_fp8(dy, x.detach(), w, options);
      const at::Tensor dx = plain_x.grad();
      if (options.rows) expect_same(back.rows, ops::quantize_rows(dx, options.quantize));
      if (options.columns) expect_same(back.columns, ops::quantize_columns(dx, options.quantize));
      if (options.keep) {
        EXPECT_TRUE(test::same_bits(back.dgate_up, dx));
      }
      if (weighted) {
        // 2048 products summed in another order.
        EXPECT_TRUE(
            test::close(back.drow_weight, plain_w.grad(), test::tolerance(at::kFloat, 200)));
      }
    }
  }
}

TEST_P(FusedFp8, TenRunsAgree) {
  const auto [device, dtype] = GetParam();
  test::Random random(5);
  const at::Tensor x = random.normal({300, 2 * 384}, dtype, device);
  const at::Tensor w = random.normal({300}, at::kFloat, device);
  const at::Tensor dy = random.normal({300, 384}, dtype, device);
  const ops::SwigluFp8Options options{.quantize = {}, .keep = true};
  const auto first = ops::swiglu_fp8(x, w, options);
  const auto first_back = ops::swiglu_gradient_fp8(dy, x, w, options);
  const ops::Weight weight{random.normal({768}, dtype, device), {}};
  const auto first_norm = ops::rms_norm_fp8(x, weight, kEps, {});
  for (int run = 1; run < 10; ++run) {
    const auto again = ops::swiglu_fp8(x, w, options);
    expect_same(again.rows, first.rows);
    expect_same(again.columns, first.columns);
    const auto back = ops::swiglu_gradient_fp8(dy, x, w, options);
    expect_same(back.rows, first_back.rows);
    expect_same(back.columns, first_back.columns);
    EXPECT_TRUE(test::same_bits(back.drow_weight, first_back.drow_weight));
    expect_same(ops::rms_norm_fp8(x, weight, kEps, {}).tiles, first_norm.tiles);
  }
}

TEST(FusedFp8Errors, NameTheArgument) {
  test::Random random(6);
  const at::Tensor x = random.normal({4, 16}, at::kDouble);
  try {
    ops::rms_norm_fp8(x, {random.normal({16}, at::kDouble), {}}, kEps, {});
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "[rms_norm_fp8] x: expected dtype Float or BFloat16, got Double");
  }
  const at::Tensor narrow = x.to(at::kFloat);
  EXPECT_THROW(ops::swiglu_fp8(narrow, {}, {.quantize = {}, .rows = false, .columns = false}),
               std::invalid_argument);
  EXPECT_THROW(ops::swiglu_fp8(narrow, random.normal({5}, at::kFloat), {}), std::invalid_argument);
  EXPECT_THROW(ops::swiglu_gradient_fp8(narrow, narrow, {}, {}), std::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(Places, FusedFp8, ::testing::ValuesIn(test::places()), test::place_name);

}  // namespace
}  // namespace dsv3
