// The tests' own tools: a comparison that cannot fail would pass everything.
#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <limits>

#include "support/compare.h"
#include "support/random.h"

namespace dsv3::test {
namespace {

TEST(Support, CloseTellsWhatDiffers) {
  Random random(1);
  const at::Tensor a = random.normal({3, 4}, at::kFloat);
  at::Tensor b = a.clone();
  EXPECT_TRUE(close(a, b, 0.0));
  EXPECT_TRUE(same_bits(a, b));
  b.select(0, 2).select(0, 1).add_(1.0);
  const auto result = close(a, b, 1e-3);
  EXPECT_FALSE(result);
  EXPECT_NE(std::string(result.message()).find("worst element [2, 1]"), std::string::npos)
      << result.message();
  EXPECT_FALSE(same_bits(a, b));
  EXPECT_FALSE(close(a, a.narrow(0, 0, 2), 1.0));
  EXPECT_FALSE(close(at::Tensor(), a, 1.0));
}

TEST(Support, CloseRefusesNotANumber) {
  Random random(2);
  const at::Tensor a = random.normal({5}, at::kFloat);
  at::Tensor b = a.clone();
  b.select(0, 3).fill_(std::numeric_limits<double>::quiet_NaN());
  EXPECT_FALSE(close(a, b, 1.0));
  EXPECT_FALSE(close(b, a, 1.0));
}

TEST(Support, SeedsRepeat) {
  EXPECT_TRUE(
      same_bits(Random(7).normal({9}, at::kBFloat16), Random(7).normal({9}, at::kBFloat16)));
  EXPECT_FALSE(same_bits(Random(7).normal({9}, at::kFloat), Random(8).normal({9}, at::kFloat)));
}

}  // namespace
}  // namespace dsv3::test
