// Published models (their config.json and reports) and the shapes of the project's benchmarks.
#include "config/presets.h"

namespace dsv3 {
namespace {

constexpr Preset kPresets[] = {
    // Technical report (arXiv:2412.19437) §4.1 and §4.2: the model and the choices of its
    // pre-training. The layout of §3 is not part of it: a preset must also run on one process.
    {"deepseek_v3", R"yaml(
model:
  num_layers: 61
  vocab_size: 129280
  hidden_size: 7168
  intermediate_size: 18432
  mla: {num_heads: 128, q_lora_rank: 1536, kv_lora_rank: 512}
  moe:
    num_experts: 256
    num_experts_per_token: 8
    num_shared_experts: 1
    moe_intermediate_size: 2048
    first_k_dense_replace: 3
    n_group: 8
    topk_group: 4
    routed_scaling_factor: 2.5
    bias_update_rate: [{value: 0.001, tokens: 14.3e12}, {value: 0}]
    sequence_loss_alpha: 1e-4
  mtp:
    num_nextn_predict_layers: 1
    loss_weight: [{value: 0.3, tokens: 10e12}, {value: 0.1}]
data: {sequence_length: 4096, fim_rate: 0.1}
training:
  global_batch_size: [{from: 3072, to: 15360, tokens: 469e9}, {value: 15360}]
optimizer:
  learning_rate: {type: deepseek_v3}
  beta1: 0.9
  beta2: 0.95
  weight_decay: 0.1
  clip: 1.0
  moment_dtype: bf16
)yaml"},
    // DeepSeek-V2 report (arXiv:2405.04434), appendix B: softmax routing without a bias.
    {"deepseek_v2_lite", R"yaml(
model:
  num_layers: 27
  vocab_size: 102400
  hidden_size: 2048
  intermediate_size: 10944
  mla: {num_heads: 16, q_lora_rank: null, kv_lora_rank: 512}
  moe:
    num_experts: 64
    num_experts_per_token: 6
    num_shared_experts: 2
    moe_intermediate_size: 1408
    norm_topk_prob: false
    scoring: softmax
    group_score: max
    use_bias: false
    sequence_loss_alpha: 1e-3
)yaml"},
    // The config.json released with Moonlight-16B-A3B.
    {"moonlight_16b", R"yaml(
model:
  num_layers: 27
  vocab_size: 163840
  hidden_size: 2048
  intermediate_size: 11264
  max_position_embeddings: 8192
  rms_norm_eps: 1e-5
  initializer_range: 0.02
  rope: {theta: 50000}
  mla: {num_heads: 16, q_lora_rank: null, kv_lora_rank: 512}
  moe:
    num_experts: 64
    num_experts_per_token: 6
    num_shared_experts: 2
    moe_intermediate_size: 1408
    routed_scaling_factor: 2.446
)yaml"},
    // Shapes of docs/performance.md.
    {"small", R"yaml(
model:
  num_layers: 12
  vocab_size: 32000
  hidden_size: 1024
  intermediate_size: 2816
  mla: {num_heads: 8, kv_lora_rank: 256}
  moe: {num_experts: 16, num_experts_per_token: 2, moe_intermediate_size: 704}
)yaml"},
    {"lite12", R"yaml(
model:
  num_layers: 12
  vocab_size: 102400
  hidden_size: 2048
  intermediate_size: 10944
  mla: {num_heads: 16}
  moe:
    num_experts: 64
    num_experts_per_token: 6
    num_shared_experts: 2
    moe_intermediate_size: 1408
    routed_scaling_factor: 2.446
)yaml"},
    {"v3slice", R"yaml(
model:
  num_layers: 3
  vocab_size: 129280
  hidden_size: 7168
  intermediate_size: 18432
  mla: {num_heads: 128, q_lora_rank: 1536}
  moe:
    num_experts: 32
    num_experts_per_token: 8
    moe_intermediate_size: 2048
    n_group: 8
    topk_group: 4
    routed_scaling_factor: 2.5
)yaml"},
};

}  // namespace

std::span<const Preset> presets() {
  return kPresets;
}

}  // namespace dsv3
