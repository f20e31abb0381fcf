#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include "mla/latent_cache.h"
#include "mla/mla.h"
#include "support/compare.h"
#include "support/random.h"

namespace dsv3 {
namespace {

using test::close;

class CachedMla : public ::testing::TestWithParam<at::Device> {
 protected:
  void check(bool q_lora, DType dtype, const std::vector<int64_t>& chunks, double most);

  uint64_t seed = test::fresh_seed();
  test::Random random{seed};
  ::testing::ScopedTrace trace{__FILE__, __LINE__, test::seed_text(seed)};
};

/// Feeds `chunks` of tokens one after the other and compares with the forward over all of them.
void CachedMla::check(bool q_lora, DType dtype, const std::vector<int64_t>& chunks, double most) {
  SCOPED_TRACE(::testing::Message() << (q_lora ? "q_lora " : "") << name_of(dtype));
  ModelConfig config;
  config.hidden_size = 32;
  config.initializer_range = 0.2;
  config.rope.type = RopeConfig::Type::kYarn;
  config.mla = {.num_heads = 3,
                .q_lora_rank = q_lora ? 16 : 0,
                .kv_lora_rank = 20,
                .qk_nope_head_dim = 12,
                .qk_rope_head_dim = 8,
                .v_head_dim = 10};
  const c10::AutoGradMode no_gradients(false);
  ParameterSet parameters;
  const auto mla = Mla::declare(parameters, config, 1, "model.layers.1.self_attn.");
  parameters.allocate({.dtype = dtype, .gradients = false, .cuda = GetParam().is_cuda()});
  parameters.initialize(seed);

  int64_t length = 0;
  for (const int64_t chunk : chunks) length += chunk;
  const int64_t sequences = 2;
  const auto type = dtype == DType::kF64   ? at::kDouble
                    : dtype == DType::kF32 ? at::kFloat
                                           : at::kBFloat16;
  const auto x = random.normal({sequences, length, 32}, type, GetParam());
  const auto positions = at::arange(length, at::TensorOptions(at::kInt).device(GetParam()))
                             .unsqueeze(0)
                             .expand({sequences, length});
  ForwardContext context;
  context.cos_sin = rope_table(config.rope, 8, length).to(GetParam());
  const auto run = [&](int64_t begin, int64_t count, LatentCache* cache) {
    context.num_sequences = sequences;
    context.sequence_length = count;
    context.positions = positions.narrow(1, begin, count).reshape({sequences * count});
    context.cache = cache;
    const auto input = x.narrow(1, begin, count).reshape({sequences * count, 32});
    return mla.forward({input, {}}, context).view({sequences, count, 32});
  };
  const auto whole = run(0, length, nullptr);
  LatentCache cache(2, sequences, length, 28, x.options());
  std::vector<at::Tensor> parts;
  int64_t begin = 0;
  for (const int64_t chunk : chunks) {
    parts.push_back(run(begin, chunk, &cache));
    begin += chunk;
  }
  EXPECT_EQ(cache.length(), length);
  EXPECT_TRUE(close(at::cat(parts, 1), whole, most));
}

TEST_P(CachedMla, TokenByTokenEqualsTheWholeForward) {
  for (const bool q_lora : {false, true}) {
    check(q_lora, DType::kF32, std::vector<int64_t>(20, 1), 1e-5);
    check(q_lora, DType::kBF16, std::vector<int64_t>(20, 1), 2e-2);
  }
}

TEST_P(CachedMla, ChunksEqualTheWholeForward) {
  check(true, DType::kF64, {70, 1, 1, 5, 13, 1}, 1e-12);
  check(false, DType::kF32, {1, 66, 9}, 1e-5);
  check(true, DType::kBF16, {65, 1, 10}, 2e-2);
  check(true, DType::kF32, {40}, 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Devices, CachedMla, ::testing::ValuesIn(test::devices()),
                         [](const auto& instance) { return instance.param.str().substr(0, 4); });

TEST(LatentCache, KeepsLayersApartAndGrows) {
  LatentCache cache(2, 1, 5, 3, at::TensorOptions(at::kFloat));
  test::Random random(test::fresh_seed());
  const auto a = random.normal({1, 2, 3}, at::kFloat), b = random.normal({1, 2, 3}, at::kFloat);
  const auto c = random.normal({1, 3, 3}, at::kFloat);
  EXPECT_EQ(cache.length(), 0);
  EXPECT_TRUE(test::same_bits(cache.append(0, a), a));
  EXPECT_TRUE(test::same_bits(cache.append(1, b), b));
  EXPECT_EQ(cache.length(), 2);
  EXPECT_TRUE(test::same_bits(cache.append(0, c), at::cat({a, c}, 1)));
}

TEST(LatentCache, RefusesWhatDoesNotFit) {
  LatentCache cache(1, 2, 4, 3, at::TensorOptions(at::kFloat));
  test::Random random(test::fresh_seed());
  const auto draw = [&](int64_t b, int64_t s, int64_t w) {
    return random.normal({b, s, w}, at::kFloat);
  };
  EXPECT_THROW(cache.append(0, draw(1, 1, 3)), std::invalid_argument);
  EXPECT_THROW(cache.append(0, draw(2, 1, 4)), std::invalid_argument);
  EXPECT_THROW(cache.append(1, draw(2, 1, 3)), std::invalid_argument);
  EXPECT_THROW(cache.append(0, draw(2, 5, 3)), std::invalid_argument);
  EXPECT_EQ(cache.length(), 0);
  cache.append(0, draw(2, 3, 3));
  EXPECT_THROW(cache.append(0, draw(2, 2, 3)), std::invalid_argument);
  EXPECT_EQ(cache.length(), 3);
}

}  // namespace
}  // namespace dsv3
