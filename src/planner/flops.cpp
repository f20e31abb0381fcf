#include "planner/flops.h"

#include "base/error.h"

namespace dsv3 {
namespace {

/// N of "model.layers.N.…", -1 for other names.
int64_t layer_of(const std::string& released_name) {
  static const std::string prefix = "model.layers.";
  if (!released_name.starts_with(prefix)) return -1;
  return std::stoll(released_name.substr(prefix.size()));
}

}  // namespace

const char* name_of(ModelPart part) {
  switch (part) {
    case ModelPart::kEmbedding:
      return "embedding";
    case ModelPart::kAttention:
      return "attention";
    case ModelPart::kDenseMlp:
      return "dense MLP";
    case ModelPart::kRoutedExperts:
      return "routed experts";
    case ModelPart::kSharedExperts:
      return "shared experts";
    case ModelPart::kRouter:
      return "router";
    case ModelPart::kNorms:
      return "norms";
    case ModelPart::kHead:
      return "head";
    case ModelPart::kMtp:
      return "MTP modules";
  }
  return "?";
}

ModelPart part_of(const ParameterSpec& spec, const ModelConfig& config) {
  DSV3_CHECK(!spec.pieces.empty(), "{} has no checkpoint name", spec.name);
  const std::string& name = spec.pieces.front().name;
  const auto holds = [&](const char* text) { return name.find(text) != std::string::npos; };
  if (layer_of(name) >= config.num_layers) return ModelPart::kMtp;
  if (holds("embed_tokens")) return ModelPart::kEmbedding;
  if (holds("lm_head")) return ModelPart::kHead;
  if (holds("norm")) return ModelPart::kNorms;
  if (holds(".self_attn.")) return ModelPart::kAttention;
  if (holds(".mlp.experts.")) return ModelPart::kRoutedExperts;
  if (holds(".mlp.shared_experts.")) return ModelPart::kSharedExperts;
  if (holds(".mlp.gate.")) return ModelPart::kRouter;
  if (holds(".mlp.")) return ModelPart::kDenseMlp;
  DSV3_CHECK(false, "{} belongs to no part of the model", name);
  return ModelPart::kMtp;
}

double flops_per_token(const ModelConfig& config, const ParameterSet& parameters,
                       int64_t sequence_length, bool with_mtp) {
  const int64_t depths = with_mtp ? config.mtp.num_nextn_predict_layers : 0;
  double matrices = 0;
  bool own_head = false;
  for (const auto& parameter : parameters.parameters()) {
    const auto& spec = parameter.spec;
    if (!spec.trainable || spec.shape.size() < 2) continue;
    const auto part = part_of(spec, config);
    if (part == ModelPart::kEmbedding || (part == ModelPart::kMtp && !with_mtp)) continue;
    own_head = own_head || part == ModelPart::kHead;
    matrices += static_cast<double>(spec.numel()) * spec.active_fraction;
  }
  // A tied head is declared as the embedding; the product with it happens all the same, and again
  // for each MTP depth.
  const auto head = static_cast<double>(config.vocab_size * config.hidden_size);
  matrices += head * static_cast<double>(depths + (own_head ? 0 : 1));
  const auto& mla = config.mla;
  const double attention =
      static_cast<double>(config.num_layers + depths) * static_cast<double>(sequence_length) *
      static_cast<double>(mla.num_heads * (mla.qk_head_dim() + mla.v_head_dim));
  return 3.0 * (2.0 * matrices + attention);
}

}  // namespace dsv3
