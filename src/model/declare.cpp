// The parameters of the whole model under the released checkpoint's names.
#include <fmt/format.h>

#include "model/model.h"

namespace dsv3 {
namespace {

Parameter* declare_norm(ParameterSet& parameters, const ModelConfig& config, int64_t layer,
                        const std::string& name) {
  return &parameters.declare({.name = name,
                              .shape = {config.hidden_size},
                              .pieces = {{.name = name, .row_end = config.hidden_size}},
                              .layer = layer,
                              .decay = false,
                              .init = Init::kOnes});
}

Parameter* declare_vocabulary(ParameterSet& parameters, const ModelConfig& config, int64_t layer,
                              const std::string& name) {
  return &parameters.declare({.name = name,
                              .shape = {config.vocab_size, config.hidden_size},
                              .pieces = {{.name = name, .row_end = config.vocab_size, .tp_dim = 0}},
                              .layer = layer,
                              .vocabulary = true,
                              .init_std = config.initializer_range});
}

Block declare_block(ParameterSet& parameters, const ModelConfig& config, int64_t layer,
                    bool is_moe) {
  const std::string prefix = fmt::format("model.layers.{}.", layer);
  Block block;
  block.layer = layer;
  block.is_moe = is_moe;
  block.input_norm = declare_norm(parameters, config, layer, prefix + "input_layernorm.weight");
  block.mla = Mla::declare(parameters, config, layer, prefix + "self_attn.");
  block.post_attention_norm =
      declare_norm(parameters, config, layer, prefix + "post_attention_layernorm.weight");
  if (is_moe) {
    block.moe = Moe::declare(parameters, config, layer, prefix + "mlp.");
  } else {
    block.mlp = Mlp::declare(parameters, config, layer, prefix + "mlp.", config.intermediate_size);
  }
  return block;
}

MtpModule declare_mtp(ParameterSet& parameters, const ModelConfig& config, int64_t layer) {
  const std::string prefix = fmt::format("model.layers.{}.", layer);
  const int64_t hidden = config.hidden_size;
  MtpModule module;
  module.embedding_norm = declare_norm(parameters, config, layer, prefix + "enorm.weight");
  module.hidden_norm = declare_norm(parameters, config, layer, prefix + "hnorm.weight");
  module.projection =
      &parameters.declare({.name = prefix + "eh_proj.weight",
                           .shape = {hidden, 2 * hidden},
                           .pieces = {{.name = prefix + "eh_proj.weight", .row_end = hidden}},
                           .layer = layer,
                           .init_std = config.initializer_range});
  module.block = declare_block(parameters, config, layer, config.moe.num_experts > 0);
  module.final_norm = declare_norm(parameters, config, layer, prefix + "shared_head.norm.weight");
  return module;
}

}  // namespace

Model::Model(const ModelConfig& config, ParameterSet& parameters) : config_(config) {
  embedding_ = declare_vocabulary(parameters, config_, -1, "model.embed_tokens.weight");
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    blocks_.push_back(declare_block(parameters, config_, layer, config_.is_moe_layer(layer)));
    if (blocks_.back().is_moe) moe_layers_.push_back(layer);
  }
  final_norm_ = declare_norm(parameters, config_, config_.num_layers, "model.norm.weight");
  head_ = config_.tie_word_embeddings
              ? embedding_
              : declare_vocabulary(parameters, config_, config_.num_layers, "lm_head.weight");
  for (int64_t depth = 0; depth < config_.mtp.num_nextn_predict_layers; ++depth) {
    const int64_t layer = config_.num_layers + depth;
    mtp_.push_back(declare_mtp(parameters, config_, layer));
    if (mtp_.back().block.is_moe) moe_layers_.push_back(layer);
  }
  for (const int64_t layer : moe_layers_) {
    const Block& block = layer < config_.num_layers
                             ? blocks_[static_cast<size_t>(layer)]
                             : mtp_[static_cast<size_t>(layer - config_.num_layers)].block;
    router_biases_.push_back(block.moe.gate_bias);
  }
}

}  // namespace dsv3
