#include "checkpoint/hf_config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace dsv3 {
namespace {

using Json = nlohmann::json;

/// As released beside DeepSeek-V3.
Json v3() {
  return Json::parse(R"({"architectures":["DeepseekV3ForCausalLM"],"attention_bias":false,
    "attention_dropout":0.0,"bos_token_id":0,"eos_token_id":1,"ep_size":1,"first_k_dense_replace":3,
    "hidden_act":"silu","hidden_size":7168,"initializer_range":0.02,"intermediate_size":18432,
    "kv_lora_rank":512,"max_position_embeddings":163840,"model_type":"deepseek_v3",
    "moe_intermediate_size":2048,"moe_layer_freq":1,"n_group":8,"n_routed_experts":256,
    "n_shared_experts":1,"norm_topk_prob":true,"num_attention_heads":128,"num_experts_per_tok":8,
    "num_hidden_layers":61,"num_key_value_heads":128,"num_nextn_predict_layers":1,
    "q_lora_rank":1536,"qk_nope_head_dim":128,"qk_rope_head_dim":64,"rms_norm_eps":1e-06,
    "rope_scaling":{"beta_fast":32,"beta_slow":1,"factor":40,"mscale":1.0,"mscale_all_dim":1.0,
    "original_max_position_embeddings":4096,"type":"yarn"},"rope_theta":10000,
    "routed_scaling_factor":2.5,"scoring_func":"sigmoid","tie_word_embeddings":false,
    "topk_group":4,"topk_method":"noaux_tc","torch_dtype":"bfloat16","use_cache":true,
    "v_head_dim":128,"vocab_size":129280})");
}

Json v2_lite() {
  return Json::parse(R"({"model_type":"deepseek_v2","hidden_size":2048,"intermediate_size":10944,
    "kv_lora_rank":512,"q_lora_rank":null,"moe_intermediate_size":1408,"moe_layer_freq":1,
    "n_group":1,"topk_group":1,"n_routed_experts":64,"n_shared_experts":2,"norm_topk_prob":false,
    "num_attention_heads":16,"num_key_value_heads":16,"num_experts_per_tok":6,
    "num_hidden_layers":27,"qk_nope_head_dim":128,"qk_rope_head_dim":64,"v_head_dim":128,
    "first_k_dense_replace":1,"routed_scaling_factor":1.0,"scoring_func":"softmax",
    "topk_method":"greedy","torch_dtype":"bfloat16","vocab_size":102400,"rope_theta":10000,
    "max_position_embeddings":163840,
    "rope_scaling":{"beta_fast":32,"beta_slow":1,"factor":40,"mscale":0.707,
    "mscale_all_dim":0.707,"original_max_position_embeddings":4096,"type":"yarn"}})");
}

ModelConfig read(const Json& json) {
  return parse_hf_config(json.dump(), "config.json").model;
}

std::string error_of(const Json& json) {
  try {
    parse_hf_config(json.dump(), "DIR/config.json");
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(HfConfig, ReadsTheReleasedV3) {
  const HfConfig config = parse_hf_config(v3().dump(), "config.json");
  const ModelConfig& m = config.model;
  EXPECT_EQ(m.num_layers, 61);
  EXPECT_EQ(m.vocab_size, 129280);
  EXPECT_EQ(m.hidden_size, 7168);
  EXPECT_EQ(m.dtype, DType::kBF16);
  EXPECT_EQ(m.mla.q_lora_rank, 1536);
  EXPECT_EQ(m.mla.num_heads, 128);
  EXPECT_EQ(m.moe.n_group, 8);
  EXPECT_EQ(m.moe.topk_group, 4);
  EXPECT_TRUE(m.moe.use_bias);
  EXPECT_EQ(m.moe.group_score, MoeConfig::GroupScore::kTop2Sum);
  EXPECT_EQ(m.moe.scoring, MoeConfig::Scoring::kSigmoid);
  EXPECT_EQ(m.mtp.num_nextn_predict_layers, 1);
  EXPECT_EQ(m.rope.type, RopeConfig::Type::kYarn);
  EXPECT_EQ(m.rope.factor, 40);
  EXPECT_EQ(m.rope.mscale_all_dim, 1);
  EXPECT_EQ(m.mla.latent_norm_eps, 1e-6);
  EXPECT_EQ(config.eos_token_ids, std::vector<int64_t>{1});
}

TEST(HfConfig, ReadsV2LiteWithSoftmaxAndNoBias) {
  const ModelConfig m = read(v2_lite());
  EXPECT_EQ(m.moe.scoring, MoeConfig::Scoring::kSoftmax);
  EXPECT_FALSE(m.moe.use_bias);
  EXPECT_FALSE(m.moe.norm_topk_prob);
  EXPECT_EQ(m.mla.q_lora_rank, 0);
  EXPECT_DOUBLE_EQ(m.rope.mscale, 0.707);
  Json grouped = v2_lite();
  grouped["topk_method"] = "group_limited_greedy";
  grouped["n_group"] = 8;
  grouped["topk_group"] = 3;
  EXPECT_EQ(read(grouped).moe.group_score, MoeConfig::GroupScore::kMax);
  EXPECT_EQ(read(grouped).moe.topk_group, 3);
  grouped["topk_method"] = "greedy";  // then groups do not limit
  EXPECT_EQ(read(grouped).moe.n_group, 1);
}

TEST(HfConfig, BothSpellingsOfRopeAreTheSame) {
  Json renamed = v3();
  renamed["rope_parameters"] = renamed["rope_scaling"];
  renamed["rope_parameters"]["rope_type"] = "yarn";
  renamed["rope_parameters"].erase("type");
  renamed["rope_parameters"]["rope_theta"] = 50000.0;
  renamed.erase("rope_scaling");
  renamed.erase("rope_theta");
  ModelConfig expected = read(v3());
  expected.rope.theta = 50000.0;
  EXPECT_EQ(read(renamed), expected);
  renamed["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 7.5}};
  EXPECT_EQ(read(renamed).rope.type, RopeConfig::Type::kNone);
  EXPECT_EQ(read(renamed).rope.theta, 7.5);
}

/// (cos/sin factor, softmax factor) that a config leads to.
std::pair<double, double> temperatures(const Json& scaling) {
  Json json = v3();
  json["rope_scaling"] = scaling;
  const RopeConfig rope = read(json).rope;
  const auto g = [&](double m) { return 0.1 * m * std::log(rope.factor) + 1; };
  return {g(rope.mscale) / g(rope.mscale_all_dim), std::pow(g(rope.mscale_all_dim), 2)};
}

TEST(HfConfig, YarnTemperaturesFollowTransformers) {
  const Json base = {{"type", "yarn"}, {"factor", 8}, {"original_max_position_embeddings", 64}};
  const double g1 = 0.1 * std::log(8.0) + 1;
  const auto with = [&](Json extra) {
    Json json = base;
    json.update(extra);
    return temperatures(json);
  };
  EXPECT_NEAR(with(Json::object()).first, g1, 1e-12);
  EXPECT_NEAR(with(Json::object()).second, 1.0, 1e-12);
  EXPECT_NEAR(with({{"mscale_all_dim", 0.5}}).first, g1, 1e-12);  // only one given: g(1)
  EXPECT_NEAR(with({{"mscale_all_dim", 0.5}}).second, std::pow(0.05 * std::log(8.0) + 1, 2), 1e-12);
  EXPECT_NEAR(with({{"mscale", 0.5}}).first, g1, 1e-12);
  EXPECT_NEAR(with({{"mscale", 2.0}, {"mscale_all_dim", 1.0}}).first,
              (0.2 * std::log(8.0) + 1) / g1, 1e-12);
  EXPECT_NEAR(with({{"attention_factor", 1.25}, {"mscale", 1.0}, {"mscale_all_dim", 1.0}}).first,
              1.25, 1e-12);
}

TEST(HfConfig, WrittenConfigReadsBackTheSame) {
  Json odd = v3();
  odd["rope_scaling"] = {{"type", "yarn"},
                         {"factor", 8.0},
                         {"attention_factor", 1.125},
                         {"original_max_position_embeddings", 77}};
  Json softmax = v3();
  softmax["scoring_func"] = "softmax";
  Json grouped = v2_lite();
  grouped["topk_method"] = "group_limited_greedy";
  grouped["n_group"] = 8;
  grouped["topk_group"] = 3;
  for (const Json& json : {v3(), v2_lite(), odd, softmax, grouped}) {
    ModelConfig first = read(json);
    ModelConfig second = parse_hf_config(to_hf_config(first), "again").model;
    EXPECT_NEAR(first.rope.mscale, second.rope.mscale, 1e-12);
    second.rope.mscale = first.rope.mscale;
    EXPECT_EQ(first, second) << to_hf_config(first);
  }
  EXPECT_TRUE(is_deepseek_v2(read(v2_lite())));
  EXPECT_FALSE(is_deepseek_v2(read(v3())));
}

TEST(HfConfig, AbsentFieldsMeanThePublishedDefaults) {
  Json json = v3();
  for (const char* key : {"n_group", "topk_group", "q_lora_rank", "n_routed_experts",
                          "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor",
                          "norm_topk_prob", "scoring_func", "topk_method"}) {
    json.erase(key);
  }
  EXPECT_EQ(read(json), read(v3()));  // the released V3 has every default
  json["n_group"] = 2;
  EXPECT_EQ(read(json).moe.topk_group, 2);
  json["n_group"] = json["topk_group"] = json["q_lora_rank"] = json["n_shared_experts"] = nullptr;
  EXPECT_EQ(read(json).moe.n_group, 1);  // null says: none
  EXPECT_EQ(read(json).moe.topk_group, 1);
  EXPECT_EQ(read(json).mla.q_lora_rank, 0);
  EXPECT_EQ(read(json).moe.num_shared_experts, 0);
  Json lite = v2_lite();
  for (const char* key : {"n_group", "topk_group", "n_routed_experts", "n_shared_experts"}) {
    lite.erase(key);
  }
  EXPECT_EQ(read(lite), read(v2_lite()));
  lite.erase("q_lora_rank");
  EXPECT_EQ(read(lite).mla.q_lora_rank, 1536);
}

TEST(HfConfig, DenseModelsStayDense) {
  Json dense = v3();
  dense["n_routed_experts"] = nullptr;
  const ModelConfig model = read(dense);
  EXPECT_EQ(model.moe.num_experts, 0);
  const Json written = Json::parse(to_hf_config(model));
  EXPECT_EQ(written["first_k_dense_replace"], model.num_layers);
  EXPECT_EQ(read(written).moe.num_experts, 0);
}

TEST(HfConfig, EveryRefusalNamesFileAndField) {
  const auto expect_refused = [](const std::string& key, const Json& value) {
    Json json = v3();
    json[key] = value;
    const std::string message = error_of(json);
    EXPECT_NE(message.find("DIR/config.json: "), std::string::npos) << key << " = " << value;
    EXPECT_NE(message.find(key), std::string::npos) << message;
  };
  expect_refused("model_type", "llama");
  expect_refused("model_type", nullptr);
  expect_refused("hidden_size", nullptr);
  expect_refused("hidden_size", -1);
  expect_refused("hidden_size", "7168");
  expect_refused("hidden_size", 1e30);
  expect_refused("hidden_size", 18446744073709551615ull);
  expect_refused("num_hidden_layers", 2000000000);
  expect_refused("n_routed_experts", 1000000000);
  expect_refused("vocab_size", 2000000000);
  expect_refused("vocab_size", 2.5);
  expect_refused("num_key_value_heads", 8);
  expect_refused("attention_bias", true);
  expect_refused("mlp_bias", true);
  expect_refused("hidden_act", "gelu");
  expect_refused("qk_rope_head_dim", 63);
  expect_refused("n_group", 7);
  expect_refused("topk_group", 9);
  expect_refused("num_experts_per_tok", 129);
  expect_refused("scoring_func", "tanh");
  expect_refused("topk_method", "random");
  expect_refused("rope_interleave", false);
  expect_refused("rope_theta", 0.5);
  expect_refused("rope_scaling", 3);
  expect_refused("rope_scaling", {{"type", "linear"}, {"factor", 2}});
  expect_refused("rope_scaling", {{"type", "yarn"}, {"factor", 0.5}});
  expect_refused("quantization_config", {{"quant_method", "fp8"}});
  expect_refused("torch_dtype", "int8");
  expect_refused("eos_token_id", "x");
  Json v2 = v2_lite();
  v2["norm_topk_prob"] = true;
  EXPECT_NE(error_of(v2).find("norm_topk_prob"), std::string::npos);
  EXPECT_THROW(parse_hf_config("{", "x"), std::invalid_argument);
  EXPECT_THROW(parse_hf_config("[]", "x"), std::invalid_argument);
  EXPECT_THROW(parse_hf_config(std::string(100000, '['), "x"), std::invalid_argument);
}

// topk_method says both how groups are scored and whether there is a bias: some routers have no
// name.
TEST(HfConfig, RoutersWithoutANameAreNotWritten) {
  ModelConfig model = read(v3());
  model.moe.group_score = MoeConfig::GroupScore::kMax;
  EXPECT_THROW(to_hf_config(model), std::invalid_argument);
  model.moe.scoring = MoeConfig::Scoring::kSoftmax;
  model.moe.use_bias = false;
  EXPECT_NO_THROW(to_hf_config(model));
  model.moe.group_score = MoeConfig::GroupScore::kTop2Sum;
  EXPECT_THROW(to_hf_config(model), std::invalid_argument);
  model.moe.n_group = model.moe.topk_group = 1;
  EXPECT_NO_THROW(to_hf_config(model));
}

}  // namespace
}  // namespace dsv3
