#pragma once

#include <string>

#include "config/config.h"
#include "mla/mla.h"
#include "nn/parameter.h"

namespace dsv3 {

/// SwiGLU MLP, used dense and as the shared experts: down(silu(gate(x)) · up(x)).
struct Mlp {
  Parameter* gate_up = nullptr;  // [2I, D]
  Parameter* down = nullptr;     // [D, I]
  static Mlp declare(ParameterSet& parameters, const ModelConfig& config, int64_t layer,
                     const std::string& prefix, int64_t intermediate_size);
  at::Tensor forward(const ops::Remakable& x, const ForwardContext& context) const;
};

/// What a MoE layer tells about one forward, all on the device.
struct MoeStatistics {
  at::Tensor counts;        // [E] int32, valid tokens per expert of this forward
  at::Tensor balance_loss;  // scalar FP32 (sum over sequences), undefined when α is 0
};

/// Mixture of experts (technical report §2.1.2): router, routed experts, shared experts. Dropless.
struct Moe {
  const ModelConfig* config = nullptr;
  Parameter* gate = nullptr;             // [E, D] FP32
  Parameter* gate_bias = nullptr;        // [E] FP32 buffer: e_score_correction_bias
  Parameter* experts_gate_up = nullptr;  // [E, 2I, D]
  Parameter* experts_down = nullptr;     // [E, D, I]
  Mlp shared;                            // without num_shared_experts: null parameters

  static Moe declare(ParameterSet& parameters, const ModelConfig& config, int64_t layer,
                     const std::string& prefix);
  /// x [T, D] normalised → [T, D]; `statistics` (may be null) receives loads and the balance loss,
  /// in which only the context's valid tokens count (NUMERICS traps 6, 7).
  at::Tensor forward(const ops::Remakable& x, const ForwardContext& context,
                     MoeStatistics* statistics) const;
};

}  // namespace dsv3
