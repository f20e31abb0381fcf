#pragma once

#include "config/config.h"
#include "nn/parameter.h"

namespace dsv3 {

/// Where a parameter belongs in a table of the model; told from its released tensor name.
enum class ModelPart : uint8_t {
  kEmbedding,
  kAttention,
  kDenseMlp,
  kRoutedExperts,
  kSharedExperts,
  kRouter,
  kNorms,
  kHead,
  kMtp,  // everything of the multi-token-prediction modules but the shared embedding and head
};
inline constexpr int kNumModelParts = 9;

const char* name_of(ModelPart part);

/// The part of a declared parameter. Throws std::logic_error for a name that fits none.
ModelPart part_of(const ParameterSpec& spec, const ModelConfig& config);

/// Model FLOPs to train on one token, backward included, attention causal:
///   3 · (2 · P + L · S · H · (N + R + V)),
/// P = matrix parameters that a token meets (K of E routed experts; no embedding; the head once for
/// the model and once for each MTP depth), L = layers with the MTP modules', S = sequence length.
/// Recomputation does not count. `parameters` need only be declared. `with_mtp` false leaves the
/// MTP modules out.
double flops_per_token(const ModelConfig& config, const ParameterSet& parameters,
                       int64_t sequence_length, bool with_mtp = true);

}  // namespace dsv3
