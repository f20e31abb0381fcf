#include "ops/normal.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "kernels/detail/philox.h"
#include "kernels/optimizer.h"
#include "ops/dispatch.h"
#include "support/gradients.h"

namespace dsv3 {
namespace {

TEST(Philox, PublishedVectors) {
  // Random123's known answers for philox4x32, 10 rounds.
  const auto zero = kernels::detail::philox4x32(0, 0, 0);
  EXPECT_EQ(zero.word[0], 0x6627e8d5u);
  EXPECT_EQ(zero.word[1], 0xe169c58du);
  EXPECT_EQ(zero.word[2], 0xbc57ac4cu);
  EXPECT_EQ(zero.word[3], 0x9b00dbd8u);
  const uint64_t ones = ~uint64_t{0};
  const auto full = kernels::detail::philox4x32(ones, ones, ones);
  EXPECT_EQ(full.word[0], 0x408f276du);
  EXPECT_EQ(full.word[1], 0x41c83b0eu);
  EXPECT_EQ(full.word[2], 0xa20bc7c6u);
  EXPECT_EQ(full.word[3], 0x6d5451fdu);
}

class Normal : public ::testing::TestWithParam<test::Place> {
 protected:
  static at::Tensor filled(at::IntArrayRef sizes, const test::Place& place, uint64_t seed,
                           uint64_t stream, double mean = 0.0, double std = 1.0) {
    at::Tensor y = at::zeros(sizes, at::TensorOptions(place.dtype).device(place.device));
    ops::fill_normal(y, mean, std, seed, stream);
    return y;
  }
};

TEST_P(Normal, MomentsAndTails) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  const at::Tensor y = filled({1000003}, GetParam(), seed, 5).to(at::kCPU, at::kDouble);
  // Five standard errors of a million draws.
  EXPECT_NEAR(y.mean().item<double>(), 0.0, 5e-3);
  EXPECT_NEAR(y.square().mean().item<double>(), 1.0, 7.1e-3);
  EXPECT_NEAR(y.pow(3).mean().item<double>(), 0.0, 2e-2);
  EXPECT_NEAR(y.pow(4).mean().item<double>(), 3.0, 5e-2);
  EXPECT_NEAR(y.abs().gt(1.959964).to(at::kDouble).mean().item<double>(), 0.05, 2e-3);
  const at::Tensor next = y.narrow(0, 0, 1000002).mul(y.narrow(0, 1, 1000002));
  EXPECT_NEAR(next.mean().item<double>(), 0.0, 5e-3);
  EXPECT_LT(y.abs().max().item<double>(), 5.9);
}

TEST_P(Normal, MeanAndStandardDeviationScale) {
  const at::Tensor unit = filled({4099}, {GetParam().device, at::kFloat}, 3, 4).to(at::kDouble);
  const at::Tensor y = filled({4099}, GetParam(), 3, 4, 1.5, 0.006);
  EXPECT_TRUE(test::close(y, unit.mul(0.006).add(1.5), test::tolerance(GetParam().dtype, 2)));
}

TEST_P(Normal, SameOnEveryDeviceAndOtherForOtherKeys) {
  const auto place = GetParam();
  const at::Tensor y = filled({5001}, place, 77, 123456789012345ull);
  EXPECT_TRUE(test::same_bits(y, filled({5001}, place, 77, 123456789012345ull)));
  const at::Tensor host = filled({5001}, {at::kCPU, at::kFloat}, 77, 123456789012345ull);
  const double worst =
      y.to(at::kCPU, at::kDouble).sub(host.to(at::kDouble)).abs().max().item<double>();
  EXPECT_LE(worst, place.dtype == at::kFloat ? 2e-6 : 2.0e-2);  // BF16: half a unit at 4 … 5.8
  EXPECT_GT(test::relative_error(filled({5001}, place, 78, 123456789012345ull), y), 1.0);
  EXPECT_GT(test::relative_error(filled({5001}, place, 77, 123456789012346ull), y), 1.0);
}

TEST_P(Normal, ShardsAreCutsOfTheWhole) {
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const int64_t rows = 37, columns = 53;
  const at::Tensor whole = filled({rows, columns}, GetParam(), seed, 9);
  for (int i = 0; i < 20; ++i) {
    const int64_t r0 = random.integer(0, rows - 1), c0 = random.integer(0, columns - 1);
    const int64_t r = random.integer(0, rows - r0), c = random.integer(0, columns - c0);
    const int64_t stride = c + random.integer(0, 5);
    at::Tensor shard = at::zeros({r * stride + 1}, whole.options());
    kernels::normal_fill({.rows = r,
                          .columns = c,
                          .first = r0 * columns + c0,
                          .pitch = columns,
                          .stride = stride,
                          .seed = seed,
                          .stream = 9,
                          .mean = 0.0f,
                          .std = 1.0f,
                          .dtype = ops::dtype_of(shard, "test", "shard"),
                          .y = shard.mutable_data_ptr()},
                         ops::stream_of(shard));
    const at::Tensor cut = whole.narrow(0, r0, r).narrow(1, c0, c);
    EXPECT_TRUE(test::same_bits(shard.as_strided({r, c}, {stride, 1}), cut));
    EXPECT_EQ(shard.ne(0).sum().item<int64_t>(), cut.ne(0).sum().item<int64_t>())
        << "wrote outside";
  }
}

INSTANTIATE_TEST_SUITE_P(Places, Normal, ::testing::ValuesIn(test::places()), test::place_name);

}  // namespace
}  // namespace dsv3
