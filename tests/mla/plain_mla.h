#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "mla/mla.h"

namespace dsv3::test {

/// Weights by their checkpoint names without the layer's prefix ("q_a_proj.weight"), float64
/// leaves.
using PlainWeights = std::map<std::string, at::Tensor>;

/// Copies the declared parameters, piece by piece.
PlainWeights plain_weights(const ParameterSet& parameters, const std::string& prefix);

/// Multi-head latent attention again, from the paper's equations (arXiv:2405.04434 §2.1.2, eq.
/// 9–19), in float64 and differentiable; no YaRN; shares no code with the
/// operators. positions and documents as in ForwardContext, on the CPU.
at::Tensor plain_mla(const ModelConfig& config, const PlainWeights& weights, const at::Tensor& x,
                     int64_t num_sequences, const at::Tensor& positions,
                     const at::Tensor& documents, double scale);

}  // namespace dsv3::test
