#include "ops/latent_cache.h"

#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "support/gradients.h"

namespace dsv3 {
namespace {

struct Sizes {
  int64_t tokens, latent, rope, pad;  // pad: extra columns that make the rows strided
};

class LatentCacheWrite : public ::testing::TestWithParam<test::Place> {
 protected:
  /// `count` different slots of [0, slots), some of them replaced by ones that write nowhere.
  static at::Tensor draw_slots(test::Random& random, int64_t count, int64_t slots) {
    std::vector<int32_t> all(static_cast<size_t>(slots));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
    for (size_t i = 0; i < all.size(); ++i) {
      std::swap(all[i],
                all[static_cast<size_t>(random.integer(static_cast<int64_t>(i), slots - 1))]);
    }
    all.resize(static_cast<size_t>(count));
    if (count > 4) {
      all[1] = -1;
      all[3] = static_cast<int32_t>(slots);
    }
    return at::tensor(all, at::kInt);
  }
};

TEST_P(LatentCacheWrite, HasTheReferencesBits) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  const Sizes sizes[] = {{37, 512, 64, 0}, {1, 512, 64, 0},  {0, 512, 64, 0}, {20, 128, 8, 0},
                         {11, 384, 6, 0},  {19, 512, 64, 5}, {9, 640, 64, 8}, {70, 256, 32, 576}};
  for (const auto& [T, C, R, pad] : sizes) {
    SCOPED_TRACE(::testing::Message()
                 << "tokens " << T << ", C " << C << ", R " << R << ", pad " << pad);
    const int64_t blocks = 3, block_size = 32;
    // As it leaves the down-projection: latent and rope beside each other in one row.
    const at::Tensor both = random.normal({T, C + R + pad}, dtype);
    const at::Tensor latent = both.narrow(1, 0, C), rope = both.narrow(1, C, R);
    const at::Tensor moved = both.to(device);
    const at::Tensor slots = draw_slots(random, T, blocks * block_size);
    for (const bool fp8 : {false, true}) {
      const int64_t width = fp8 ? C + C / 128 * 4 + 2 * R : C + R;
      // What no token is written to must stay.
      const at::Tensor expected =
          at::full({blocks, block_size, width}, 77.0, fp8 ? at::kByte : at::kBFloat16);
      const at::Tensor actual = expected.to(device, expected.scalar_type(), false, true);
      for (const auto& options :
           {ops::QuantizeOptions{}, ops::QuantizeOptions{.power_of_two = true}}) {
        ops::reference::latent_cache_write(latent, rope, slots, expected, options);
        ops::latent_cache_write(moved.narrow(1, 0, C), moved.narrow(1, C, R), slots.to(device),
                                actual, options);
        EXPECT_TRUE(test::same_bits(actual, expected));
      }
    }
  }
}

TEST_P(LatentCacheWrite, TokenIsFlashMlas) {
  const auto [device, dtype] = GetParam();
  test::Random random(8);
  const at::Tensor latent = random.normal({1, 512}, dtype), rope = random.normal({1, 64}, dtype);
  const at::Tensor cache = at::full({2, 64, 656}, 0, at::TensorOptions(at::kByte).device(device));
  ops::latent_cache_write(latent.to(device), rope.to(device),
                          at::tensor({70}, at::TensorOptions(at::kInt)).to(device), cache);
  const at::Tensor token = cache.select(0, 1).select(0, 6).cpu();
  const at::Tensor scales = token.narrow(0, 512, 16).view(at::kFloat);
  for (int64_t tile = 0; tile < 4; ++tile) {
    const at::Tensor x = latent.narrow(1, 128 * tile, 128).to(at::kFloat);
    EXPECT_EQ(scales[tile].item<float>(), x.abs().max().item<float>() / 448.0f);
    const at::Tensor codes = token.narrow(0, 128 * tile, 128).view(at::kFloat8_e4m3fn);
    EXPECT_TRUE(test::close(codes.to(at::kFloat).mul(scales[tile]), x.flatten(), 0x1p-4));
  }
  EXPECT_TRUE(test::same_bits(token.narrow(0, 528, 128).view(at::kBFloat16),
                              rope.to(at::kBFloat16).flatten()));
}

TEST(LatentCacheWriteErrors, NameTheArgument) {
  test::Random random(9);
  const at::Tensor latent = random.normal({3, 128}, at::kFloat),
                   rope = random.normal({3, 8}, at::kFloat);
  const at::Tensor slots = at::tensor({0, 1, 2}, at::TensorOptions(at::kInt));
  const at::Tensor cache = at::full({1, 8, 136}, 0.0, at::kBFloat16);
  try {
    ops::latent_cache_write(latent, rope, slots, cache.narrow(2, 0, 128));
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "[latent_cache_write] cache: expected shape [*, *, 136], got [1, 8, 128]");
  }
  EXPECT_THROW(ops::latent_cache_write(latent, rope, slots.to(at::kLong), cache),
               std::invalid_argument);
  EXPECT_THROW(ops::latent_cache_write(latent, rope, slots, cache.to(at::kFloat)),
               std::invalid_argument);
  const at::Tensor narrow = random.normal({3, 100}, at::kFloat);
  EXPECT_THROW(ops::latent_cache_write(narrow, rope, slots, at::full({1, 8, 116}, 0, at::kByte)),
               std::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(Places, LatentCacheWrite, ::testing::ValuesIn(test::places()),
                         test::place_name);

}  // namespace
}  // namespace dsv3
