#include "checkpoint/hf_config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"

namespace dsv3 {
namespace {

using Json = nlohmann::ordered_json;

/// Typed access to one JSON object; every complaint names file and field.
class Fields {
 public:
  Fields(const Json& object, std::string name, std::string prefix = "")
      : object_(object), name_(std::move(name)), prefix_(std::move(prefix)) {}

  template <typename... Args>
  [[noreturn]] void refuse(const std::string& key, fmt::format_string<Args...> format,
                           Args&&... args) const {
    invalid("{}: {}{}: {}", name_, prefix_, key, fmt::format(format, std::forward<Args>(args)...));
  }

  /// Null when absent or null.
  const Json* find(const std::string& key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  int64_t count(const std::string& key, int64_t minimum) const {
    if (find(key) == nullptr) refuse(key, "is missing");
    return count(key, minimum, 0);
  }
  int64_t count(const std::string& key, int64_t minimum, int64_t fallback) const {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number_integer()) refuse(key, "expected a whole number, got {}", value->dump());
    // An unsigned beyond int64 would wrap: compare as double first.
    const int64_t maximum = most(key);
    if (value->get<double>() > static_cast<double>(maximum) || value->get<int64_t>() < minimum) {
      refuse(key, "expected {} … {}, got {}", minimum, maximum, value->dump());
    }
    return value->get<int64_t>();
  }
  /// Absent and null differ where null says "none": an absent field means the published default.
  int64_t count_or_none(const std::string& key, int64_t none, int64_t published) const {
    return object_.contains(key) ? count(key, none, none) : published;
  }
  double number(const std::string& key, double fallback) const {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number() || !std::isfinite(value->get<double>())) {
      refuse(key, "expected a number, got {}", value->dump());
    }
    return value->get<double>();
  }
  double positive(const std::string& key, double fallback) const {
    const double value = number(key, fallback);
    if (!(value > 0)) refuse(key, "expected a number above 0, got {}", value);
    return value;
  }
  bool flag(const std::string& key, bool fallback) const {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) refuse(key, "expected true or false, got {}", value->dump());
    return value->get<bool>();
  }
  std::string text(const std::string& key, const std::string& fallback) const {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_string()) refuse(key, "expected a string, got {}", value->dump());
    return value->get<std::string>();
  }
  Fields object(const std::string& key) const {
    const Json* value = find(key);
    if (!value->is_object()) refuse(key, "expected an object, got {}", value->dump());
    return {*value, name_, prefix_ + key + "."};
  }

 private:
  /// The largest count that a model of ours can have, as in the config's ranges
  /// (config/schema_model.cpp): a stranger's file must not make us declare a billion layers.
  static int64_t most(const std::string& key) {
    if (key == "num_hidden_layers" || key == "first_k_dense_replace" || key == "moe_layer_freq")
      return 4096;
    if (key == "n_routed_experts") return 512;
    if (key == "num_experts_per_tok") return 16;
    if (key == "n_group" || key == "topk_group" || key == "num_nextn_predict_layers") return 64;
    if (key == "qk_rope_head_dim" || key == "n_shared_experts") return 1024;
    if (key == "max_position_embeddings" || key == "original_max_position_embeddings")
      return int64_t{1} << 31;
    return int64_t{1} << 24;
  }

  const Json& object_;
  std::string name_, prefix_;
};

/// YaRN's get_mscale: 0.1 · mscale · ln(factor) + 1.
double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

/// Our pair (mscale, mscale_all_dim) with the cos/sin factor g(mscale)/g(all) and the softmax
/// factor g(all)². Note: transformers takes the ratio only when both are given and non-zero, else
/// g(1); an explicit attention_factor wins. Each case has its exact equivalent in our pair.
void read_yarn_temperature(const Fields& fields, RopeConfig& rope) {
  const double mscale = fields.number("mscale", 0);
  rope.mscale_all_dim = fields.number("mscale_all_dim", 0);
  rope.mscale = mscale;
  const bool explicit_factor = fields.find("attention_factor") != nullptr;
  if (!explicit_factor && mscale != 0 && rope.mscale_all_dim != 0) return;
  const double attention_factor =
      explicit_factor ? fields.positive("attention_factor", 1) : yarn_mscale(rope.factor, 1);
  if (rope.factor <= 1) {
    rope.mscale = rope.mscale_all_dim;
    if (attention_factor != 1) fields.refuse("attention_factor", "needs a factor above 1");
  } else if (!explicit_factor && rope.mscale_all_dim == 0) {
    rope.mscale = 1;
  } else {
    const double numerator = attention_factor * yarn_mscale(rope.factor, rope.mscale_all_dim);
    rope.mscale = (numerator - 1) / (0.1 * std::log(rope.factor));
  }
}

void read_yarn(const Fields& fields, int64_t max_position_embeddings, RopeConfig& rope) {
  rope.type = RopeConfig::Type::kYarn;
  rope.original_max_position_embeddings =
      fields.count("original_max_position_embeddings", 1, max_position_embeddings);
  const double ratio = static_cast<double>(max_position_embeddings) /
                       static_cast<double>(rope.original_max_position_embeddings);
  rope.factor = fields.positive("factor", ratio);
  if (rope.factor < 1) fields.refuse("factor", "expected at least 1, got {}", rope.factor);
  rope.beta_fast = fields.number("beta_fast", 32);
  rope.beta_slow = fields.number("beta_slow", 1);
  if (rope.beta_fast == 0) rope.beta_fast = 32;  // as transformers does
  if (rope.beta_slow == 0) rope.beta_slow = 1;
  if (!(rope.beta_slow > 0 && rope.beta_fast >= rope.beta_slow)) {
    fields.refuse("beta_fast", "expected beta_fast >= beta_slow > 0, got {} and {}", rope.beta_fast,
                  rope.beta_slow);
  }
  if (!fields.flag("truncate", true)) fields.refuse("truncate", "only true is supported");
  read_yarn_temperature(fields, rope);
}

void read_rope(const Fields& fields, ModelConfig& model) {
  RopeConfig& rope = model.rope;
  rope.theta = fields.positive("rope_theta", 10000.0);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (fields.find(key) == nullptr) continue;
    const Fields scaling = fields.object(key);
    rope.theta = scaling.positive("rope_theta", rope.theta);
    if (scaling.number("partial_rotary_factor", 1.0) != 1.0) {
      scaling.refuse("partial_rotary_factor", "only 1 is supported");
    }
    const std::string type = scaling.text("rope_type", scaling.text("type", "default"));
    if (type == "yarn") {
      read_yarn(scaling, model.max_position_embeddings, rope);
    } else if (type != "default") {
      scaling.refuse("rope_type", "'{}' is not supported; expected yarn or default", type);
    }
  }
  if (!(rope.theta > 1)) fields.refuse("rope_theta", "expected above 1, got {}", rope.theta);
  if (!fields.flag("rope_interleave", true)) {
    fields.refuse("rope_interleave", "false (pairs in halves) is not supported");
  }
}

void read_attention(const Fields& fields, ModelConfig& model) {
  MlaConfig& mla = model.mla;
  mla.num_heads = fields.count("num_attention_heads", 1);
  const int64_t kv_heads = fields.count("num_key_value_heads", 1, mla.num_heads);
  if (kv_heads != mla.num_heads) {
    fields.refuse("num_key_value_heads",
                  "{} differs from num_attention_heads = {}; latent attention has one latent for "
                  "all heads",
                  kv_heads, mla.num_heads);
  }
  mla.q_lora_rank = fields.count_or_none("q_lora_rank", 0, 1536);
  mla.kv_lora_rank = fields.count("kv_lora_rank", 1);
  mla.qk_nope_head_dim = fields.count("qk_nope_head_dim", 1);
  mla.qk_rope_head_dim = fields.count("qk_rope_head_dim", 2);
  mla.v_head_dim = fields.count("v_head_dim", 1);
  mla.latent_norm_eps = 1e-6;  // fixed in transformers, whatever rms_norm_eps says
  if (mla.qk_rope_head_dim % 2 != 0) {
    fields.refuse("qk_rope_head_dim", "expected an even number, got {}", mla.qk_rope_head_dim);
  }
  if (fields.flag("attention_bias", false)) fields.refuse("attention_bias", "is not supported");
}

/// How the router scores and chooses: the one place where the V2 and V3 families differ.
void read_router(const Fields& fields, bool v2, MoeConfig& moe) {
  const std::string scoring = fields.text("scoring_func", v2 ? "softmax" : "sigmoid");
  if (scoring == "sigmoid" && !v2) {
    moe.scoring = MoeConfig::Scoring::kSigmoid;
  } else if (scoring == "softmax") {
    moe.scoring = MoeConfig::Scoring::kSoftmax;
  } else {
    fields.refuse("scoring_func", "'{}' is not supported; expected {}", scoring,
                  v2 ? "softmax" : "sigmoid or softmax");
  }
  moe.n_group = fields.count_or_none("n_group", 1, v2 ? 1 : 8);
  const int64_t topk_group = v2 ? moe.n_group : std::min<int64_t>(4, moe.n_group);
  moe.topk_group = fields.count("topk_group", 1, topk_group);
  const std::string method = fields.text("topk_method", v2 ? "greedy" : "noaux_tc");
  moe.use_bias = method == "noaux_tc";
  moe.group_score = moe.use_bias ? MoeConfig::GroupScore::kTop2Sum : MoeConfig::GroupScore::kMax;
  if (method == "greedy" || method == "gready") {  // the released V2 code's default spells it so
    moe.n_group = moe.topk_group = 1;
  } else if (method != "group_limited_greedy" && (method != "noaux_tc" || v2)) {
    fields.refuse(
        "topk_method", "'{}' is not supported; expected {}", method,
        v2 ? "greedy or group_limited_greedy" : "noaux_tc, greedy or group_limited_greedy");
  }
  moe.norm_topk_prob = fields.flag("norm_topk_prob", !v2);
  if (v2 && moe.norm_topk_prob) {
    fields.refuse(
        "norm_topk_prob",
        "true is not supported for deepseek_v2: published implementations disagree on it");
  }
  moe.routed_scaling_factor = fields.positive("routed_scaling_factor", v2 ? 1.0 : 2.5);
}

void read_moe(const Fields& fields, bool v2, ModelConfig& model) {
  MoeConfig& moe = model.moe;
  moe.num_experts = fields.count_or_none("n_routed_experts", 0, v2 ? 64 : 256);
  if (moe.num_experts == 0) return;
  moe.num_experts_per_token = fields.count("num_experts_per_tok", 1);
  moe.num_shared_experts = fields.count_or_none("n_shared_experts", 0, v2 ? 2 : 1);
  moe.moe_intermediate_size = fields.count("moe_intermediate_size", 1);
  moe.first_k_dense_replace = fields.count("first_k_dense_replace", 0, v2 ? 0 : 3);
  moe.moe_layer_freq = fields.count("moe_layer_freq", 1, 1);
  read_router(fields, v2, moe);
  if (moe.num_experts % moe.n_group != 0) {
    fields.refuse("n_group", "{} groups do not divide n_routed_experts = {}", moe.n_group,
                  moe.num_experts);
  }
  if (moe.topk_group > moe.n_group) {
    fields.refuse("topk_group", "{} is more than n_group = {}", moe.topk_group, moe.n_group);
  }
  const int64_t reachable = moe.num_experts / moe.n_group * moe.topk_group;
  if (moe.num_experts_per_token > reachable) {
    fields.refuse("num_experts_per_tok", "{} is more than the {} experts a token can reach",
                  moe.num_experts_per_token, reachable);
  }
}

DType read_dtype(const Fields& fields) {
  const std::string key = fields.find("dtype") != nullptr ? "dtype" : "torch_dtype";
  std::string name = fields.text(key, "float32");
  if (name.starts_with("torch.")) name = name.substr(6);
  if (name == "bfloat16") return DType::kBF16;
  // Note: float16 has no place in training here; its numbers fit float32 exactly.
  if (name == "float32" || name == "float16" || name == "float64") return DType::kF32;
  fields.refuse(key, "'{}' is not supported; expected bfloat16 or float32", name);
}

std::vector<int64_t> read_eos(const Fields& fields, const Json& json) {
  std::vector<int64_t> ids;
  const auto found = json.find("eos_token_id");
  if (found == json.end() || found->is_null()) return ids;
  const Json list = found->is_array() ? *found : Json::array({*found});
  for (const Json& id : list) {
    if (!id.is_number_integer()) {
      fields.refuse("eos_token_id", "expected an id or a list of ids, got {}", found->dump());
    }
    ids.push_back(id.get<int64_t>());
  }
  return ids;
}

Json parse_object(std::string_view text, const std::string& name) {
  const auto shallow = [&](int depth, Json::parse_event_t, Json&) {
    require(depth <= 32, "{}: nested too deeply for a config.json", name);
    return true;
  };
  Json json;
  try {
    json = Json::parse(text, shallow);
  } catch (const Json::exception& error) {
    invalid("{}: not valid JSON ({})", name, error.what());
  }
  require(json.is_object(), "{}: expected a JSON object", name);
  return json;
}

}  // namespace

HfConfig parse_hf_config(std::string_view text, const std::string& name) {
  const Json json = parse_object(text, name);
  const Fields fields(json, name);
  if (fields.find("model_type") == nullptr) fields.refuse("model_type", "is missing");
  const std::string type = fields.text("model_type", "");
  const bool v2 = type == "deepseek_v2";
  if (!v2 && type != "deepseek_v3" && type != "kimi_k2") {
    fields.refuse("model_type",
                  "'{}' is not supported; expected deepseek_v3, kimi_k2 or deepseek_v2", type);
  }
  if (fields.find("quantization_config") != nullptr) {
    fields.refuse("quantization_config",
                  "quantised checkpoints are not read; give one in BF16 or F32");
  }
  HfConfig result;
  ModelConfig& model = result.model;
  model.dtype = read_dtype(fields);
  model.num_layers = fields.count("num_hidden_layers", 1);
  model.vocab_size = fields.count("vocab_size", 1);
  model.hidden_size = fields.count("hidden_size", 1);
  model.intermediate_size = fields.count("intermediate_size", 1);
  model.max_position_embeddings = fields.count("max_position_embeddings", 1, v2 ? 2048 : 4096);
  model.rms_norm_eps = fields.positive("rms_norm_eps", 1e-6);
  model.initializer_range = fields.positive("initializer_range", 0.02);
  model.tie_word_embeddings = fields.flag("tie_word_embeddings", false);
  if (const auto act = fields.text("hidden_act", "silu"); act != "silu") {
    fields.refuse("hidden_act", "'{}' is not supported; expected silu", act);
  }
  if (fields.flag("mlp_bias", false)) fields.refuse("mlp_bias", "is not supported");
  read_attention(fields, model);
  read_rope(fields, model);
  read_moe(fields, v2, model);
  model.mtp.num_nextn_predict_layers =
      fields.count("num_nextn_predict_layers", 0, fields.count("num_mtp_layers", 0, 0));
  result.eos_token_ids = read_eos(fields, json);
  return result;
}

HfConfig load_hf_config(const std::filesystem::path& directory) {
  const auto path = directory / "config.json";
  return parse_hf_config(read_file(path), path.string());
}

bool is_deepseek_v2(const ModelConfig& model) {
  const MoeConfig& moe = model.moe;
  return moe.num_experts > 0 && moe.scoring == MoeConfig::Scoring::kSoftmax && !moe.use_bias &&
         !moe.norm_topk_prob &&
         (moe.n_group == 1 || moe.group_score == MoeConfig::GroupScore::kMax);
}

namespace {

Json rope_scaling(const RopeConfig& rope) {
  if (rope.type == RopeConfig::Type::kNone) return nullptr;
  Json json = {{"type", "yarn"},
               {"factor", rope.factor},
               {"original_max_position_embeddings", rope.original_max_position_embeddings},
               {"beta_fast", rope.beta_fast},
               {"beta_slow", rope.beta_slow},
               {"mscale", rope.mscale},
               {"mscale_all_dim", rope.mscale_all_dim}};
  // Where transformers would not take the ratio of the two, the factor is written out.
  if ((rope.mscale == 0 || rope.mscale_all_dim == 0) &&
      !(rope.mscale == 1 && rope.mscale_all_dim == 0)) {
    json["attention_factor"] =
        yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim);
  }
  return json;
}

void write_moe(const MoeConfig& moe, bool v2, Json& json) {
  json["n_routed_experts"] = moe.num_experts;
  json["num_experts_per_tok"] = moe.num_experts_per_token;
  json["n_shared_experts"] = moe.num_shared_experts;
  json["moe_intermediate_size"] = moe.moe_intermediate_size;
  json["first_k_dense_replace"] = moe.first_k_dense_replace;
  json["moe_layer_freq"] = moe.moe_layer_freq;
  json["n_group"] = moe.n_group;
  json["topk_group"] = moe.topk_group;
  const bool softmax = moe.scoring == MoeConfig::Scoring::kSoftmax;
  json["scoring_func"] = softmax ? "softmax" : "sigmoid";
  // A sigmoid router without a bias is written as one whose bias is zero.
  const bool by_max = moe.group_score == MoeConfig::GroupScore::kMax;
  const bool with_bias = !v2 && (!softmax || moe.use_bias);
  require(moe.n_group == 1 || by_max != with_bias,
          "config.json has no name for this router: model.moe.scoring({}) with group_score({}) and "
          "use_bias({}) in {} groups; group_score is top2_sum with a bias or sigmoid scores, else "
          "max",
          softmax ? "softmax" : "sigmoid", by_max ? "max" : "top2_sum", moe.use_bias, moe.n_group);
  const char* without_bias = by_max && moe.n_group > 1 ? "group_limited_greedy" : "greedy";
  json["topk_method"] = with_bias ? "noaux_tc" : without_bias;
  json["norm_topk_prob"] = moe.norm_topk_prob;
  json["routed_scaling_factor"] = moe.routed_scaling_factor;
}

}  // namespace

std::string to_hf_config(const ModelConfig& model, const std::vector<int64_t>& eos_token_ids) {
  const bool v2 = is_deepseek_v2(model);
  const MlaConfig& mla = model.mla;
  Json json;
  json["architectures"] = {v2 ? "DeepseekV2ForCausalLM" : "DeepseekV3ForCausalLM"};
  json["model_type"] = v2 ? "deepseek_v2" : "deepseek_v3";
  json["torch_dtype"] = model.dtype == DType::kBF16 ? "bfloat16" : "float32";
  json["vocab_size"] = model.vocab_size;
  json["hidden_size"] = model.hidden_size;
  json["intermediate_size"] = model.intermediate_size;
  json["num_hidden_layers"] = model.num_layers;
  json["num_nextn_predict_layers"] = model.mtp.num_nextn_predict_layers;
  json["max_position_embeddings"] = model.max_position_embeddings;
  json["num_attention_heads"] = mla.num_heads;
  json["num_key_value_heads"] = mla.num_heads;
  json["q_lora_rank"] = mla.q_lora_rank > 0 ? Json(mla.q_lora_rank) : Json(nullptr);
  json["kv_lora_rank"] = mla.kv_lora_rank;
  json["qk_nope_head_dim"] = mla.qk_nope_head_dim;
  json["qk_rope_head_dim"] = mla.qk_rope_head_dim;
  json["v_head_dim"] = mla.v_head_dim;
  write_moe(model.moe, v2, json);
  // Without experts every layer is dense, whatever the default says.
  if (model.moe.num_experts == 0) json["first_k_dense_replace"] = model.num_layers;
  json["rope_theta"] = model.rope.theta;
  json["rope_scaling"] = rope_scaling(model.rope);
  json["rms_norm_eps"] = model.rms_norm_eps;
  json["initializer_range"] = model.initializer_range;
  json["tie_word_embeddings"] = model.tie_word_embeddings;
  json["hidden_act"] = "silu";
  json["attention_bias"] = false;
  if (eos_token_ids.size() == 1) json["eos_token_id"] = eos_token_ids.front();
  if (eos_token_ids.size() > 1) json["eos_token_id"] = eos_token_ids;
  return json.dump(2) + "\n";
}

}  // namespace dsv3
