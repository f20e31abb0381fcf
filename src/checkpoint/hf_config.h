#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "config/config.h"

// config.json, the description beside released weights (DeepSeek-V3/R1, Moonlight, Kimi-K2,
// DeepSeek-V2-Lite).
namespace dsv3 {

/// What config.json says beyond the model itself.
struct HfConfig {
  ModelConfig model;
  std::vector<int64_t> eos_token_ids;  // tokens that end a text; empty when the file names none
};

/// Reads the text of a config.json. `name` stands for the file in messages. model_type deepseek_v3,
/// kimi_k2 and deepseek_v2 are understood; fields that change what the model computes are honoured
/// or refused, all others are ignored. Both spellings of the rotary embedding are read (rope_theta
/// with rope_scaling; rope_parameters). An absent optional field means what the published code of
/// its model_type takes it for (n_group 8 for deepseek_v3, n_shared_experts 2 for deepseek_v2, …).
/// Throws std::invalid_argument that names file and field.
/// Note: num_nextn_predict_layers is taken as written; whether such weights are there is another
/// question.
HfConfig parse_hf_config(std::string_view json, const std::string& name);

/// parse_hf_config of `directory`/config.json. IoError when it cannot be read.
HfConfig load_hf_config(const std::filesystem::path& directory);

/// The config.json of a resolved model, in the released spelling. What transformers can express is
/// written so that it reads it alike; parse_hf_config gives the same model back, but for what is no
/// part of it (preset, schedules, use_fp8_kv, use_deep_ep, sequence_loss_alpha).
std::string to_hf_config(const ModelConfig& model, const std::vector<int64_t>& eos_token_ids = {});

/// Whether config.json calls the model deepseek_v2 (softmax affinities, no bias).
bool is_deepseek_v2(const ModelConfig& model);

}  // namespace dsv3
