#include "ops/quantize.h"

#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "support/compare.h"
#include "support/gradients.h"

namespace dsv3 {
namespace {

using ops::QuantizeOptions;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

const QuantizeOptions kPlain{}, kPowers{.power_of_two = true}, kRaised{.min_amax = 0.5};

template <typename Tiles>
void expect_same(const Tiles& actual, const Tiles& expected) {
  EXPECT_TRUE(test::same_bits(actual.data.view(at::kByte), expected.data.view(at::kByte)));
  EXPECT_TRUE(test::same_bits(actual.scales, expected.scales));
}

struct Sizes {
  int64_t rows, width, pad;  // pad: extra columns that make the rows strided
};
const Sizes kSizes[] = {{1, 1, 0},     {1, 128, 0},  {3, 5, 0},    {128, 128, 0}, {129, 130, 0},
                        {200, 384, 8}, {5, 1000, 3}, {257, 72, 0}, {0, 64, 0},    {33, 576, 64},
                        {300, 256, 1}, {64, 0, 0},   {9, 2048, 0}};

class Quantize : public ::testing::TestWithParam<test::Place> {
 protected:
  /// Rows whose magnitudes lie 16 powers of ten apart, some of them zero.
  static at::Tensor draw(test::Random& random, int64_t rows, int64_t width, at::ScalarType dtype) {
    at::Tensor x = random.normal({rows, width}, at::kDouble);
    for (int64_t t = 0; t < rows; ++t) x.select(0, t).mul_(std::pow(10.0, random.uniform(-12, 4)));
    if (rows > 2) x.select(0, rows / 2).zero_();
    return x.to(dtype);
  }
};

TEST_P(Quantize, EveryFormHasTheReferencesBits) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [T, K, pad] : kSizes) {
    SCOPED_TRACE(::testing::Message() << "rows " << T << ", width " << K << ", pad " << pad);
    const at::Tensor host = draw(random, T, K + pad, dtype).narrow(1, pad / 2, K);
    const at::Tensor x = draw(random, T, K + pad, dtype).to(device).narrow(1, pad / 2, K);
    x.copy_(host);
    for (const auto& options : {kPlain, kPowers, kRaised}) {
      const auto rows = ops::reference::quantize_rows(host, options);
      const auto columns = ops::reference::quantize_columns(host, options);
      expect_same(ops::quantize_rows(x, options), rows);
      expect_same(ops::quantize_columns(x, options), columns);
      const auto both = ops::quantize_both(x, options);
      expect_same(both.first, rows);
      expect_same(both.second, columns);
      const auto blocks = ops::reference::quantize_blocks(host, options);
      expect_same(ops::quantize_blocks(x, options), blocks);
      for (const auto type : {at::kFloat, at::kBFloat16}) {
        EXPECT_TRUE(test::same_bits(ops::dequantize(both.first, type),
                                    ops::reference::dequantize(rows, type)));
        EXPECT_TRUE(test::same_bits(ops::dequantize(both.second, type, T),
                                    ops::reference::dequantize(columns, type, T)));
        EXPECT_TRUE(test::same_bits(ops::dequantize(ops::quantize_blocks(x, options), type),
                                    ops::reference::dequantize(blocks, type)));
      }
      expect_same(
          ops::requantize_columns(both.first, options),
          ops::reference::quantize_columns(ops::reference::dequantize(rows, at::kFloat), options));
    }
  }
}

TEST_P(Quantize, GroupsLeavePaddedWithZeros) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const std::vector<std::vector<int32_t>> all = {
      {0}, {1}, {128}, {0, 0, 5}, {130, 130, 130}, {7, 135, 391, 391, 400}, {0, 300, 300}};
  const int64_t K = 200;
  for (const auto& ends : all) {
    SCOPED_TRACE(::testing::Message() << ends.size() << " groups, " << ends.back() << " rows");
    const at::Tensor host = draw(random, ends.back(), K, dtype), x = host.to(device);
    const ops::RowGroups groups{at::tensor(ends, at::kInt)}, moved{groups.ends.to(device)};
    const auto rows = ops::reference::quantize_rows(host, kPlain, groups);
    const auto columns = ops::reference::quantize_columns(host, kPlain, groups);
    EXPECT_EQ(rows.data.size(0),
              ops::padded_group_rows(ends.back(), static_cast<int64_t>(ends.size())));
    const auto both = ops::quantize_both(x, kPlain, moved);
    expect_same(both.first, rows);
    expect_same(both.second, columns);
    const auto compact = ops::quantize_rows(x, kPlain);
    expect_same(ops::requantize_columns(compact, kPlain, moved),
                ops::reference::quantize_columns(
                    ops::reference::dequantize(compact, at::kFloat).cpu(), kPlain, groups));
  }
}

TEST_P(Quantize, ManyGroups) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const int64_t count : {31, 32, 33, 256}) {
    std::vector<int32_t> ends;
    for (int64_t e = 0, end = 0; e < count; ++e) {
      end += random.integer(0, 3) == 0 ? random.integer(1, 140) : 0;
      ends.push_back(static_cast<int32_t>(end));
    }
    const at::Tensor host = draw(random, ends.back(), 24, dtype);
    const ops::RowGroups groups{at::tensor(ends, at::kInt)}, moved{groups.ends.to(device)};
    const auto both = ops::quantize_both(host.to(device), kPlain, moved);
    expect_same(both.first, ops::reference::quantize_rows(host, kPlain, groups));
    expect_same(both.second, ops::reference::quantize_columns(host, kPlain, groups));
  }
}

TEST_P(Quantize, HalfwayNumbersGoToEven) {
  const auto [device, dtype] = GetParam();
  // With 448 in the tile the scale is 1: multiples of half a step meet every tie, and beyond.
  std::vector<double> numbers = {448.0, 464.0 - 32.0, 440.0, -440.0, -0.0, 0x1p-10, 3 * 0x1p-10};
  for (int exponent = -9; exponent < 8; ++exponent) {
    for (int sixteenths = 16; sixteenths < 32; ++sixteenths) {
      numbers.push_back(std::ldexp(sixteenths, exponent - 4));
      numbers.push_back(-std::ldexp(sixteenths + 0x1p-4, exponent - 4));
    }
  }
  while (numbers.size() % 127 != 0) numbers.push_back(0.0);
  const auto rows = static_cast<int64_t>(numbers.size() / 127);
  at::Tensor host = at::full({rows, 128}, 448.0, at::kDouble);
  host.narrow(1, 0, 127).copy_(at::tensor(numbers, at::kDouble).reshape({rows, 127}));
  host = host.to(dtype);
  const auto actual = ops::quantize_rows(host.to(device), kPlain);
  expect_same(actual, ops::reference::quantize_rows(host, kPlain));
  EXPECT_EQ(actual.scales.min().item<float>(), 1.0f);
  EXPECT_EQ(actual.scales.max().item<float>(), 1.0f);
}

TEST_P(Quantize, EveryCodeComesBack) {
  const auto [device, dtype] = GetParam();
  const at::Tensor codes = at::arange(256, at::kInt).to(at::kByte).reshape({2, 128});
  ops::Fp8RowTiles tiles{codes.view(at::kFloat8_e4m3fn), at::full({2, 1}, 1.0, at::kFloat)};
  const at::Tensor expected = ops::reference::dequantize(tiles, at::kFloat);
  tiles.data = tiles.data.to(device);
  tiles.scales = tiles.scales.to(device);
  const at::Tensor actual = ops::dequantize(tiles, dtype).cpu().to(at::kFloat);
  EXPECT_TRUE(at::allclose(actual, expected, 0.0, 0.0, /*equal_nan=*/true));
  EXPECT_EQ(expected.isnan().sum().item<int64_t>(), 2);
}

TEST_P(Quantize, WhatIsNotFiniteStaysVisible) {
  const auto [device, dtype] = GetParam();
  test::Random random(3);
  at::Tensor host = random.normal({130, 256}, dtype);
  host.select(0, 2).narrow(0, 5, 1).fill_(kNaN);
  host.select(0, 3).narrow(0, 140, 1).fill_(-kInfinity);
  host.select(0, 129).fill_(-kNaN);
  const at::Tensor x = host.to(device);
  for (const auto& options : {kPlain, kPowers}) {
    const auto both = ops::quantize_both(x, options);
    expect_same(both.first, ops::reference::quantize_rows(host, options));
    expect_same(both.second, ops::reference::quantize_columns(host, options));
    expect_same(ops::quantize_blocks(x, options), ops::reference::quantize_blocks(host, options));
    const at::Tensor back = ops::dequantize(both.first, at::kFloat).cpu().isnan();
    EXPECT_EQ(back.select(0, 2).sum().item<int64_t>(), 1);
    EXPECT_EQ(back.select(0, 3).sum().item<int64_t>(), 128);
    EXPECT_EQ(back.select(0, 129).sum().item<int64_t>(), 256);
    EXPECT_EQ(back.sum().item<int64_t>(), 1 + 128 + 256);
  }
}

TEST_P(Quantize, ErrsByHalfAStep) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const at::Tensor host = random.normal({70, 300}, dtype), wide = host.to(at::kDouble);
  for (const auto& options : {kPlain, kPowers}) {
    const auto rows = ops::quantize_rows(host.to(device), options);
    const at::Tensor back = ops::dequantize(rows, at::kFloat).cpu().to(at::kDouble);
    // Half of the last of 3 mantissa bits, or half of the smallest step, 2^-9 of the scale.
    const at::Tensor scale =
        rows.scales.cpu().to(at::kDouble).repeat_interleave(128, 1).narrow(1, 0, 300);
    const at::Tensor most = wide.abs().mul(0x1p-4).add(scale.mul(0x1p-10)).mul(1.0 + 1e-6);
    EXPECT_TRUE(back.sub(wide).abs().le(most).all().item<bool>());
    EXPECT_GT(back.sub(wide).abs().max().item<double>(), 0.0);
  }
}

TEST_P(Quantize, TenRunsAgree) {
  const auto [device, dtype] = GetParam();
  test::Random random(4);
  const at::Tensor x = random.normal({513, 520}, dtype, device);
  const auto first = ops::quantize_both(x, kPlain);
  const auto blocks = ops::quantize_blocks(x, kPlain);
  for (int run = 1; run < 10; ++run) {
    const auto again = ops::quantize_both(x, kPlain);
    expect_same(again.first, first.first);
    expect_same(again.second, first.second);
    expect_same(ops::quantize_blocks(x, kPlain), blocks);
  }
}

TEST_P(Quantize, LayoutIsWhatTheProductReads) {
  const auto [device, dtype] = GetParam();
  test::Random random(5);
  const auto both = ops::quantize_both(random.normal({130, 258}, dtype, device), kPlain);
  EXPECT_EQ(both.first.scales.sizes(), (at::IntArrayRef{130, 3}));
  EXPECT_EQ(both.first.scales.strides(), (at::IntArrayRef{1, 132}));
  EXPECT_EQ(both.second.data.sizes(), (at::IntArrayRef{258, 256}));
  EXPECT_EQ(both.second.scales.sizes(), (at::IntArrayRef{258, 2}));
  EXPECT_EQ(both.second.scales.strides(), (at::IntArrayRef{1, 260}));
}

TEST(QuantizeErrors, NameTheArgument) {
  test::Random random(6);
  const at::Tensor x = random.normal({4, 16}, at::kFloat);
  try {
    ops::quantize_rows(x, {.min_amax = 0.0});
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "[quantize_rows] min_amax: expected a number in [2^-100, 2^100], got 0");
  }
  EXPECT_THROW(ops::quantize_rows(x.to(at::kDouble), kPlain), std::invalid_argument);
  EXPECT_THROW(ops::quantize_blocks(x.select(0, 0), kPlain), std::invalid_argument);
  EXPECT_THROW(ops::quantize_columns(x, kPlain, {random.normal({2}, at::kFloat)}),
               std::invalid_argument);
  ops::Fp8RowTiles tiles = ops::quantize_rows(x, kPlain);
  EXPECT_THROW(ops::dequantize(tiles, at::kDouble), std::invalid_argument);
  tiles.scales = tiles.scales.narrow(0, 0, 3);
  EXPECT_THROW(ops::requantize_columns(tiles, kPlain), std::invalid_argument);
  EXPECT_THROW(ops::dequantize(ops::quantize_columns(x, kPlain), at::kFloat, 129),
               std::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(Places, Quantize, ::testing::ValuesIn(test::places()), test::place_name);

}  // namespace
}  // namespace dsv3
