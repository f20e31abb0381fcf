#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "model/model.h"
#include "planner/memory.h"
#include "planner/plan.h"

namespace dsv3 {
namespace {

/// The published model (technical report §4.2), typed in here once more on purpose.
Config deepseek_v3() {
  Config config;
  auto& model = config.model;
  model.num_layers = 61;
  model.hidden_size = 7168;
  model.vocab_size = 129280;
  model.intermediate_size = 18432;
  model.mla = {.num_heads = 128, .q_lora_rank = 1536, .kv_lora_rank = 512};
  model.moe.num_experts = 256;
  model.moe.num_experts_per_token = 8;
  model.moe.num_shared_experts = 1;
  model.moe.moe_intermediate_size = 2048;
  model.moe.first_k_dense_replace = 3;
  model.moe.n_group = 8;
  model.moe.topk_group = 4;
  model.mtp.num_nextn_predict_layers = 1;
  config.data.sequence_length = 4096;
  return config;
}

Config lite12() {
  Config config;
  auto& model = config.model;
  model.num_layers = 12;
  model.hidden_size = 2048;
  model.vocab_size = 102400;
  model.intermediate_size = 10944;
  model.mla = {.num_heads = 16, .q_lora_rank = 0, .kv_lora_rank = 512};
  model.moe.num_experts = 64;
  model.moe.num_experts_per_token = 6;
  model.moe.num_shared_experts = 2;
  model.moe.moe_intermediate_size = 1408;
  return config;
}

TEST(Planner, PublishedModelHas671BillionParametersAnd37Active) {
  const Plan plan = make_plan(deepseek_v3());
  EXPECT_EQ(plan.model.total, 671'026'404'352);  // without the MTP module
  EXPECT_NEAR(plan.model.active, 37.55e9, 0.01e9);
  // One MoE layer, eh_proj and the three norms.
  EXPECT_NEAR(static_cast<double>(plan.parts[static_cast<size_t>(ModelPart::kMtp)].total), 11.61e9,
              0.01e9);
}

TEST(Planner, PartsAddUp) {
  for (const auto& config : {deepseek_v3(), lite12()}) {
    const Plan plan = make_plan(config);
    ParameterSet parameters;
    const Model model(config.model, parameters);
    int64_t total = 0;
    double active = 0;
    for (const auto& part : plan.parts) {
      total += part.total;
      active += part.active;
    }
    EXPECT_EQ(total, parameters.total_parameters());
    EXPECT_NEAR(active, parameters.active_parameters(), 1);
    for (const auto& bucket : parameters.buckets())
      EXPECT_EQ(bucket.numel(), 0) << "planning took memory";
  }
  EXPECT_NEAR(static_cast<double>(make_plan(lite12()).model.total), 6.93e9, 0.01e9);
}

TEST(Planner, FlopsPerTokenOfThePublishedModel) {
  const Plan plan = make_plan(deepseek_v3());
  // By hand: what each layer multiplies, in parameters, at 4,096 tokens.
  const double d = 7168,
               attention = d * 1536 + 1536 * 128 * 192 + d * 576 + 512 * 128 * 256 + 128 * 128 * d;
  const double expert = 3 * d * 2048, moe = 9 * expert + 256 * d, dense = 3 * d * 18432,
               head = 129280 * d;
  const double scores = 4096.0 * 128 * (192 + 128);
  const double main = 3 * (2 * (61 * attention + 3 * dense + 58 * moe + head) + 61 * scores);
  EXPECT_NEAR(plan.flops_per_token_without_mtp, main, 1);
  EXPECT_NEAR(plan.flops_per_token, main + 3 * (2 * (2 * d * d + attention + moe + head) + scores),
              1);
  // 385 TFLOP/s at 1,542 tokens/s, as published (ISCA 2025, table 4), carry three digits.
  EXPECT_NEAR(plan.flops_per_token_without_mtp, 249.7e9, 0.004 * 249.7e9);
  EXPECT_NEAR(plan.flops_per_token, 260.0e9, 0.004 * 260.0e9);
}

TEST(Planner, ATiedHeadIsMultipliedAllTheSame) {
  Config untied = lite12(), tied = lite12();
  tied.model.tie_word_embeddings = true;
  EXPECT_EQ(make_plan(untied).flops_per_token, make_plan(tied).flops_per_token);
  EXPECT_EQ(make_plan(untied).model.total - make_plan(tied).model.total, 102400 * 2048);
}

TEST(Planner, StateBytesOfOneRank) {
  Config config = lite12();
  const Plan plan = make_plan(config);
  const auto total = static_cast<double>(plan.model.total);
  // BF16 weights, FP32 gradients, masters and moments; the routers are FP32 and need no masters.
  EXPECT_NEAR(plan.memory.weights, 2 * total, 0.01e9);
  EXPECT_NEAR(plan.memory.gradients, 4 * total, 0.01e9);
  EXPECT_NEAR(plan.memory.masters, 4 * total, 0.01e9);
  EXPECT_NEAR(plan.memory.moments, 8 * total, 0.01e9);
  config.model.dtype = DType::kF32;
  EXPECT_EQ(make_plan(config).memory.masters, 0);
}

TEST(Planner, MemoryFallsWithEachKindOfParallelism) {
  Config config = deepseek_v3();
  config.parallel.expert_parallel_size = 8;
  const Plan wide = make_plan(config, 64);
  EXPECT_EQ(wide.layout.data, 64);
  config.parallel.zero_stage = 1;
  const Plan zero = make_plan(config, 64);
  EXPECT_LT(zero.memory.moments,
            wide.memory.moments / 7);  // experts are held by 8 ranks, the rest by 64
  EXPECT_EQ(zero.memory.weights, wide.memory.weights);
  config.parallel.pipeline_parallel_size = 4;
  EXPECT_LT(make_plan(config, 64).memory.weights, zero.memory.weights / 3);
  const Plan pipelined = make_plan(config, 64);
  config.parallel.tensor_parallel_size = 4;
  EXPECT_LT(make_plan(config, 64).memory.activations, pipelined.memory.activations / 3);
}

TEST(Planner, RecomputationLeavesLess) {
  const auto& model = deepseek_v3().model;
  for (const int64_t layer : {0, 10}) {
    const double none = activation_bytes_per_token(model, layer, Recompute::kNone);
    const double selective = activation_bytes_per_token(model, layer, Recompute::kSelective);
    const double full = activation_bytes_per_token(model, layer, Recompute::kFull);
    EXPECT_LT(selective, none);
    EXPECT_LT(full, selective);
    EXPECT_EQ(full, 2.0 * 7168);
  }
}

TEST(Planner, LayoutsThatDoNotFitAreRefusedWithTheEquation) {
  Config config = deepseek_v3();
  config.parallel.tensor_parallel_size = 2;
  config.parallel.pipeline_parallel_size = 4;
  try {
    make_plan(config, 12);
    FAIL() << "12 ranks were accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("tp(2) × pp(4) × cp(1) = 8"), std::string::npos)
        << error.what();
  }
  config.parallel.expert_parallel_size = 16;
  EXPECT_THROW(make_plan(config, 8), std::invalid_argument);
  EXPECT_EQ(make_plan(config).layout.ranks, 64);  // dp 8: tp(2) × dp(8) = 16 = ep
}

TEST(Planner, JsonAndTextSayTheSame) {
  const Config config = deepseek_v3();
  const Plan plan = make_plan(config);
  const auto json = nlohmann::json::parse(to_json(plan));
  EXPECT_EQ(json["parameters"]["total"], plan.model.total);
  EXPECT_EQ(json["layout"]["ranks"], 1);
  const auto text = to_text(plan, config);
  EXPECT_NE(text.find("671.03 B"), std::string::npos) << text;
  EXPECT_NE(text.find("37.55 B"), std::string::npos) << text;
}

}  // namespace
}  // namespace dsv3
