#pragma once

#include <functional>
#include <string>

#include "config/config.h"
#include "nn/parameter.h"
#include "ops/weight.h"

namespace dsv3 {

class LatentCache;

/// Sees activations as they are made: the layer (as ParameterSpec::layer), what it is ("attention",
/// "moe", "block", …) and its value [T, D]. It must not change it.
using ActivationProbe =
    std::function<void(int64_t layer, const char* name, const at::Tensor& activation)>;

/// What every layer of one forward shares: shapes, positions, rotary table, policy.
struct ForwardContext {
  int64_t num_sequences = 1;    // B
  int64_t sequence_length = 1;  // S; T = B·S
  at::Tensor positions;         // [T] int32
  at::Tensor documents;         // [T] int32 or undefined (no masking across documents)
  at::Tensor cos_sin;           // [P, R] FP32 (see ops/rope.h), from rope_table()
  Recompute recompute = Recompute::kNone;
  LatentCache* cache =
      nullptr;  // generation only: latents of earlier tokens are read from and appended here

  /// x as the next operator should take it: with its remake under selective recomputation, else to
  /// be kept.
  ops::Remakable keep_or_remake(ops::Remakable x) const {
    if (recompute != Recompute::kSelective) x.remake = {};
    return x;
  }
};

/// cos/sin rows for positions 0 … num_positions-1, float32 computed in float64; YaRN when
/// configured (arXiv:2309.00071; NUMERICS traps 9, 10). Host tensor [num_positions,
/// qk_rope_head_dim].
at::Tensor rope_table(const RopeConfig& rope, int64_t qk_rope_head_dim, int64_t num_positions);

/// (nope + rope)^-0.5, times mscale² under YaRN.
double softmax_scale(const ModelConfig& config);

/// Multi-head latent attention of one layer (arXiv:2405.04434 §2.1): the parameters and the
/// forward.
struct Mla {
  const ModelConfig* config = nullptr;
  Parameter* q_proj = nullptr;      // [H·(N+R), D] when there is no q_lora
  Parameter* kv_a_proj = nullptr;   // [C + R, D], without q_lora
  Parameter* qkv_a_proj = nullptr;  // [Q + C + R, D]: q_a and kv_a in one product, with q_lora
  Parameter* q_a_norm = nullptr;    // [Q]
  Parameter* q_b_proj = nullptr;    // [H·(N+R), Q]
  Parameter* kv_a_norm = nullptr;   // [C]
  Parameter* kv_b_proj = nullptr;   // [H·(N+Vd), C]
  Parameter* o_proj = nullptr;      // [D, H·Vd]

  /// Declares the layer's parameters under `prefix` ("model.layers.3.self_attn.").
  static Mla declare(ParameterSet& parameters, const ModelConfig& config, int64_t layer,
                     const std::string& prefix);

  /// x [T, D], already normalised → [T, D], before the residual is added.
  at::Tensor forward(const ops::Remakable& x, const ForwardContext& context) const;
};

}  // namespace dsv3
