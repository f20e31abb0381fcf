#pragma once

#include <string>
#include <utility>
#include <vector>

#include "config/config.h"
#include "mla/latent_cache.h"
#include "mla/mla.h"
#include "moe/moe.h"
#include "nn/parameter.h"

namespace dsv3 {

/// One transformer layer: x + MLA(norm(x)), then + MLP or MoE(norm(·)).
struct Block {
  Parameter* input_norm = nullptr;
  Parameter* post_attention_norm = nullptr;
  Mla mla;
  Mlp mlp;  // dense layers
  Moe moe;  // MoE layers
  bool is_moe = false;
  int64_t layer = 0;
};

/// One multi-token-prediction module (technical report §2.2); embedding and head are the model's
/// own.
struct MtpModule {
  Parameter* embedding_norm = nullptr;  // enorm
  Parameter* hidden_norm = nullptr;     // hnorm
  Parameter* projection = nullptr;      // eh_proj [D, 2D], input [enorm(embedding) | hnorm(hidden)]
  Block block;
  Parameter* final_norm = nullptr;  // shared_head.norm
};

/// Tokens as the model takes them; every tensor on the model's device.
struct TokenBatch {
  int64_t num_sequences = 0;    // B
  int64_t sequence_length = 0;  // S
  at::Tensor tokens;            // [B·S] int32
  at::Tensor
      labels;  // [B·S] int32, the next token or ops::kIgnoreLabel; may be undefined for logits
  at::Tensor positions;   // [B·S] int32
  at::Tensor documents;   // [B·S] int32, or undefined: no masking across documents
  at::Tensor valid = {};  // [B·S] bool: false for padding; undefined = every token is real
};

/// Scalars (FP32, on the device) that turn this micro-batch's sums into its share of the step's
/// objective.
struct LossScales {
  at::Tensor main;              // 1 / valid tokens of the global batch
  std::vector<at::Tensor> mtp;  // per depth: λ / D / valid tokens of that depth in the global batch
  at::Tensor balance;           // α / sequences of the global batch; undefined = off
};

struct LossOutput {
  at::Tensor objective;  // scalar; call backward() on it
  at::Tensor loss_sum;   // scalar FP32, detached: Σ cross-entropy over valid labels (nats)
  at::Tensor correct;    // scalar int64: next tokens guessed by argmax
  std::vector<at::Tensor> mtp_loss_sums;  // per depth
  std::vector<at::Tensor> mtp_correct;
  at::Tensor balance_sum;  // scalar FP32, detached: sequence-wise balance loss summed over layers;
                           // may be undefined
  // [num_moe_layers (MTP's last), E] int32: valid tokens per expert (padding and the places of a
  // depth that have no token there are none); undefined without MoE layers.
  at::Tensor expert_counts;
};

/// The whole DeepSeek-V3 model (technical report §2) as declared parameters and their forward.
class Model {
 public:
  /// Declares every parameter into `parameters` (no memory is taken: see ParameterSet::allocate).
  Model(const ModelConfig& config, ParameterSet& parameters);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  /// Loss of a micro-batch, MTP depths and balance included when their scales are given.
  LossOutput loss(const TokenBatch& batch, const LossScales& scales, Recompute recompute) const;

  /// Logits [B·S, V] in the model's dtype; with a cache, tokens continue what it holds (positions
  /// must say so).
  at::Tensor logits(const TokenBatch& batch, LatentCache* cache = nullptr) const;

  /// Adds one step's bias update to every router (moe/balance.h). loads: [num_moe_layers, E],
  /// global batch; skip: see there.
  void update_router_biases(const at::Tensor& loads, double update_rate, const at::Tensor& skip);

  /// From now on every loss() shows its activations to `probe`; an empty one ends that.
  void set_probe(ActivationProbe probe) { probe_ = std::move(probe); }

  /// The router biases [E] FP32 behind each row of expert_counts; undefined tensors without biases.
  std::vector<at::Tensor> router_biases() const;

  LatentCache make_cache(int64_t num_sequences, int64_t capacity) const;

  const ModelConfig& config() const { return config_; }
  /// Layer id of each row of expert_counts.
  const std::vector<int64_t>& moe_layers() const { return moe_layers_; }
  /// labels shifted for MTP depth k (0-based): label of position i is that of i + k + 1 in the same
  /// sequence (and document, when masking); kIgnoreLabel in the tail. For counting valid tokens
  /// too.
  static at::Tensor mtp_labels(const TokenBatch& batch, int64_t depth);
  /// [B·S] bool: the places of MTP depth k (0-based) that hold a token: i + k + 1 is in the same
  /// sequence (and document, when masking) and no padding. A place may be valid and its label
  /// ignored.
  static at::Tensor mtp_valid(const TokenBatch& batch, int64_t depth);

 private:
  std::pair<at::Tensor, MoeStatistics> run_block(const Block& block, const at::Tensor& x,
                                                 const ForwardContext& context) const;
  /// Once for each activation, not again under recomputation.
  void show(int64_t layer, const char* name, const at::Tensor& activation) const;
  ForwardContext make_context(const TokenBatch& batch, Recompute recompute,
                              LatentCache* cache) const;

  ModelConfig config_;
  Parameter* embedding_ = nullptr;  // [V, D]
  std::vector<Block> blocks_;
  Parameter* final_norm_ = nullptr;  // [D]
  Parameter* head_ = nullptr;        // [V, D]; the embedding itself when tied
  std::vector<MtpModule> mtp_;
  std::vector<int64_t> moe_layers_;
  ActivationProbe probe_;
  std::vector<Parameter*> router_biases_;  // one for each of moe_layers_; null without biases
  mutable at::Tensor cos_sin_;             // grown on demand, on the parameters' device
};

}  // namespace dsv3
