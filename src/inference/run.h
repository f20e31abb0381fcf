#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <vector>

#include "config/config.h"
#include "model/model.h"
#include "nn/parameter.h"

namespace dsv3 {

/// A model with its weights, ready to be run, and what is known about where it comes from.
struct OpenedModel {
  std::filesystem::path checkpoint;  // the directory with the weights
  std::optional<Config> run;         // of a run of ours: its whole config
  std::vector<int32_t> stop_tokens;  // eos_token_id of config.json
  std::unique_ptr<ParameterSet> parameters;
  std::unique_ptr<Model> model;
  at::Device device = at::Device(at::kCPU);

  const ModelConfig& config() const { return model->config(); }
};

struct OpenOptions {
  std::optional<DType> dtype = {};  // fp32 | bf16; empty = what config.json says
  at::Device device = at::Device(at::kCPU);
  bool averaged = false;  // the weights' moving average (training.ema) instead of the weights
};

/// Opens a RUN directory (its newest checkpoint) or a CHECKPOINT directory (config.json and
/// safetensors under the released names, ours or anybody's), for evaluation and generation: no
/// gradients, no MTP modules. The model comes from dsv3.yaml where a checkpoint of ours holds one,
/// else from config.json. Throws std::invalid_argument when `directory` is neither, IoError when a
/// file fails, or a checkpoint of ours is damaged (every byte is checked).
OpenedModel open_model(const std::filesystem::path& directory, const OpenOptions& options);

}  // namespace dsv3
