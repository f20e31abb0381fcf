#include "inference/generate.h"

#include <ATen/ops/randn.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <random>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/catalogue.h"
#include "checkpoint/save.h"
#include "checkpoint/state_tensors.h"
#include "checkpoint/temporary_directory.h"
#include "config/load.h"
#include "inference/run.h"

namespace dsv3 {
namespace {

ModelConfig tiny(bool q_lora, bool yarn) {
  ModelConfig config;
  config.dtype = DType::kF32;
  config.num_layers = 3;
  config.vocab_size = 300;
  config.hidden_size = 32;
  config.intermediate_size = 40;
  config.max_position_embeddings = 64;
  config.initializer_range = 0.2;  // activations of order one, so that argmax is clear
  config.mla = {.num_heads = 2,
                .q_lora_rank = q_lora ? 12 : 0,
                .kv_lora_rank = 16,
                .qk_nope_head_dim = 8,
                .qk_rope_head_dim = 8,
                .v_head_dim = 8};
  config.moe.num_experts = 8;
  config.moe.num_experts_per_token = 2;
  config.moe.moe_intermediate_size = 16;
  if (yarn) {
    config.rope.type = RopeConfig::Type::kYarn;
    config.rope.factor = 4;
    config.rope.original_max_position_embeddings = 16;
  }
  return config;
}

struct Tiny {
  ParameterSet parameters;
  std::unique_ptr<Model> model;
  explicit Tiny(const ModelConfig& config, uint64_t seed = 7) {
    model = std::make_unique<Model>(config, parameters);
    parameters.allocate({.dtype = config.dtype, .gradients = false});
    parameters.initialize(seed);
  }
};

const at::Device kCpu(at::kCPU);

std::vector<int32_t> random_ids(std::mt19937& random, size_t count) {
  std::vector<int32_t> ids(count);
  for (auto& id : ids) id = static_cast<int32_t>(random() % 300);
  return ids;
}

TEST(Generate, CachedGenerationEqualsUncachedArgmax) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  for (const bool q_lora : {false, true}) {
    for (const bool yarn : {false, true}) {
      const Tiny tiny_model(tiny(q_lora, yarn), seed);
      auto sequence = random_ids(random, 1 + random() % 9);
      const auto result = generate(*tiny_model.model, kCpu, sequence,
                                   {.max_tokens = 30, .sampling = {.temperature = 0}});
      ASSERT_EQ(result.tokens.size(), 30u);
      for (const int32_t token : result.tokens) {
        const at::Tensor last = sequence_logits(*tiny_model.model, kCpu, sequence)
                                    .select(0, static_cast<int64_t>(sequence.size()) - 1);
        // Equal up to a tie within rounding: the token's logit is the maximum.
        EXPECT_NEAR(last[token].item<float>(), last.max().item<float>(), 1e-4)
            << "after " << sequence.size() << " tokens";
        sequence.push_back(token);
      }
    }
  }
}

TEST(Generate, EndsWhereItIsTold) {
  const Tiny t(tiny(false, false));
  const auto free = generate(*t.model, kCpu, {1, 2, 3}, {.max_tokens = 6, .seed = 5});
  EXPECT_EQ(free.stop, Generation::Stop::kLength);
  ASSERT_EQ(free.tokens.size(), 6u);
  EXPECT_EQ(generate(*t.model, kCpu, {1, 2, 3}, {.max_tokens = 6, .seed = 5}).tokens, free.tokens);

  const auto stopped = generate(*t.model, kCpu, {1, 2, 3},
                                {.max_tokens = 6, .seed = 5, .stop_tokens = {free.tokens[2]}});
  EXPECT_EQ(stopped.stop, Generation::Stop::kEndOfDocument);
  EXPECT_LE(stopped.tokens.size(), 2u);

  std::vector<int32_t> heard;
  const auto cut = generate(*t.model, kCpu, {1, 2, 3},
                            {.max_tokens = 6, .seed = 5, .on_token = [&](int32_t token) {
                               heard.push_back(token);
                               return heard.size() < 4;
                             }});
  EXPECT_EQ(cut.stop, Generation::Stop::kCallback);
  EXPECT_EQ(heard, std::vector<int32_t>(free.tokens.begin(), free.tokens.begin() + 4));

  const std::vector<int32_t> prompt(60, 1);
  const auto full = generate(*t.model, kCpu, prompt, {.max_tokens = 10});
  EXPECT_EQ(full.stop, Generation::Stop::kContextFull);
  EXPECT_EQ(full.tokens.size(), 4u);
  EXPECT_TRUE(generate(*t.model, kCpu, {1}, {.max_tokens = 0}).tokens.empty());
}

TEST(Generate, RefusesPromptsThatCannotBeRun) {
  const Tiny t(tiny(false, false));
  EXPECT_THROW(generate(*t.model, kCpu, {}, {}), std::invalid_argument);
  EXPECT_THROW(generate(*t.model, kCpu, {300}, {}), std::invalid_argument);
  EXPECT_THROW(generate(*t.model, kCpu, {-1}, {}), std::invalid_argument);
  EXPECT_THROW(generate(*t.model, kCpu, std::vector<int32_t>(64, 1), {}), std::invalid_argument);
  EXPECT_THROW(sequence_logits(*t.model, kCpu, {0, 300}), std::invalid_argument);
}

TEST(Generate, TextIsWholeUtf8) {
  const Tiny t(tiny(false, false));
  const auto tokenizer = make_tokenizer("bytes");
  const std::string text =
      generate_text(*t.model, kCpu, *tokenizer, "é", {.max_tokens = 40, .seed = 2});
  EXPECT_FALSE(text.empty());
  EXPECT_EQ(text, generate_text(*t.model, kCpu, *tokenizer, "é", {.max_tokens = 40, .seed = 2}));
  EXPECT_EQ(encode_prompt(*tokenizer, "a"), (std::vector<int32_t>{256, 97}));
}

TEST(OpenModel, RunsAndCheckpointsOpenAlike) {
  const test::TemporaryDirectory directory;
  Config config;
  config.model = tiny(true, true);
  config.data.sequence_length = 64;
  Tiny first(config.model, 1), second(config.model, 2);
  const auto save = [&](const Tiny& t, int64_t step) {
    save_checkpoint(checkpoint_directory(directory.path(), step), t.parameters,
                    state_of(t.parameters), config.model, step,
                    {.extra_files = {{"dsv3.yaml", to_yaml(config)}}});
  };
  save(first, 100);
  save(second, 20);
  const std::vector<int32_t> ids = {5, 250, 7, 7};
  const at::Tensor expected = sequence_logits(*first.model, kCpu, ids);
  const auto run = open_model(directory.path(), {});
  EXPECT_EQ(run.checkpoint.filename(), "step_100");
  ASSERT_TRUE(run.run.has_value());
  EXPECT_TRUE(expected.equal(sequence_logits(*run.model, kCpu, ids)));
  const auto checkpoint = open_model(run.checkpoint, {});
  EXPECT_TRUE(expected.equal(sequence_logits(*checkpoint.model, kCpu, ids)));
  // Without our files, config.json alone describes the same model.
  const std::filesystem::path plain = directory.path() / "plain";
  std::filesystem::copy(run.checkpoint, plain);
  std::filesystem::remove(plain / "dsv3.yaml");
  std::filesystem::remove(plain / "manifest.json");
  const auto foreign = open_model(plain, {});
  EXPECT_FALSE(foreign.run.has_value());
  EXPECT_TRUE(expected.equal(sequence_logits(*foreign.model, kCpu, ids)));
}

TEST(OpenModel, WhatIsNoModelIsNamed) {
  const test::TemporaryDirectory directory;
  EXPECT_THROW(open_model(directory.path(), {}), std::invalid_argument);
  EXPECT_THROW(open_model(directory.path() / "nowhere", {}), IoError);
  std::filesystem::create_directories(directory.path() / "checkpoints");
  EXPECT_THROW(open_model(directory.path(), {}), std::invalid_argument);
  write_file_atomically(directory.path() / "config.json", "{}");
  EXPECT_THROW(open_model(directory.path(), {}), std::invalid_argument);
}

}  // namespace
}  // namespace dsv3
