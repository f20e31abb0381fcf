#include "ops/embedding.h"

#include <gtest/gtest.h>

#include "support/gradients.h"

namespace dsv3 {
namespace {

class Embedding : public ::testing::TestWithParam<test::Place> {};

struct Sizes {
  int64_t tokens, vocab, hidden, used;  // ids are drawn below `used`
};

const Sizes kSizes[] = {{1, 1, 1, 1},         {5, 3, 7, 3},      {64, 10, 8, 1},
                        {300, 264, 256, 264}, {33, 5, 100, 2},   {100, 50000, 24, 50000},
                        {0, 9, 16, 9},        {2000, 40, 72, 3}, {777, 7, 2048, 7},
                        {4097, 300, 33, 300}};

TEST_P(Embedding, RowsAndTheirGradient) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  for (const auto& [T, V, D, used] : kSizes) {
    for (const auto bucket : {at::kFloat, dtype}) {
      SCOPED_TRACE(::testing::Message() << "T " << T << ", V " << V << ", D " << D << ", used "
                                        << used << ", bucket " << c10::toString(bucket));
      const at::Tensor data = random.normal({V, D}, dtype), ids = random.integers({T}, used);
      const at::Tensor dy = random.normal({T, D}, dtype);
      const auto run = [&](at::ScalarType type, at::Device place, at::ScalarType bucket_type) {
        const ops::Weight weight = test::weight_of(data, type, place, bucket_type, 0.5);
        const at::Tensor y = ops::embedding(ids.to(place), weight);
        test::backward({y}, {dy});
        EXPECT_FALSE(weight.value.grad().defined());
        return std::pair(y, weight.grad);
      };
      const auto [y, grad] = run(dtype, device, bucket);
      EXPECT_TRUE(test::same_bits(y, ops::reference::embedding(ids, data)));
      EXPECT_TRUE(test::same_bits(y, data.index_select(0, ids)));
      const auto oracle = run(at::kDouble, at::kCPU, at::kDouble);
      // A sum of n terms is rounded n times.
      const auto roundings = bucket == at::kFloat ? 30.0 + static_cast<double>(T) / used : 1.0;
      EXPECT_TRUE(test::close(grad, oracle.second, test::tolerance(bucket, roundings)));
      EXPECT_TRUE(test::same_bits(grad, run(dtype, device, bucket).second));
    }
  }
}

TEST_P(Embedding, ATokenRepeatedThousandsOfTimes) {
  const auto [device, dtype] = GetParam();
  const uint64_t seed = test::fresh_seed();
  SCOPED_TRACE(test::seed_text(seed));
  test::Random random(seed);
  constexpr int64_t kTokens = 9000, kVocab = 70, kHidden = 88;
  at::Tensor ids = random.integers({kTokens}, kVocab);
  auto* id = ids.mutable_data_ptr<int32_t>();
  for (int64_t t = 0; t < kTokens; ++t) {
    if (random.integer(0, 2) > 0) id[t] = random.integer(0, 9) == 0 ? 3 : 41;
  }
  const at::Tensor data = random.normal({kVocab, kHidden}, dtype);
  const at::Tensor dy = random.normal({kTokens, kHidden}, dtype, at::kCPU, 1.0, 0.5);
  const auto run = [&](at::ScalarType type, at::Device place, at::ScalarType bucket) {
    const ops::Weight weight = test::weight_of(data, type, place, bucket, 0.5);
    test::backward({ops::embedding(ids.to(place), weight)}, {dy});
    return weight.grad;
  };
  const at::Tensor first = run(dtype, device, at::kFloat);
  // FP32 sums of up to 5,400 terms that mostly have one sign.
  EXPECT_TRUE(test::close(first, run(at::kDouble, at::kCPU, at::kDouble), 2e-5));
  for (int i = 1; i < 10; ++i) {
    EXPECT_TRUE(test::same_bits(run(dtype, device, at::kFloat), first));
  }
}

TEST_P(Embedding, FrozenTable) {
  const auto [device, dtype] = GetParam();
  test::Random random(31);
  const at::Tensor table = test::leaf(random.normal({4, 6}, dtype), dtype, device);
  const at::Tensor y = ops::embedding(random.integers({5}, 4, device), {table, {}});
  test::backward({y}, {random.normal({5, 6}, dtype)});
  EXPECT_FALSE(table.grad().defined());
}

TEST(EmbeddingErrors, NameTheToken) {
  test::Random random(32);
  const ops::Weight weight{random.normal({4, 6}, at::kFloat), {}};
  at::Tensor ids = random.integers({5}, 4);
  EXPECT_THROW(ops::embedding(ids.to(at::kLong), weight), std::invalid_argument);
  for (const int bad : {4, -1}) {
    ids.select(0, 3).fill_(bad);
    try {
      ops::embedding(ids, weight);
      FAIL();
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(std::string(error.what()),
                "[embedding] ids[3] is " + std::to_string(bad) + ", expected 0 … 3");
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Places, Embedding, ::testing::ValuesIn(test::places()), test::place_name);

}  // namespace
}  // namespace dsv3
