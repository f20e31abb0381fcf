#include "planner/memory.h"

#include <algorithm>
#include <cmath>

namespace dsv3 {
namespace {

/// Pipeline stage of a parameter: layers in equal runs, the embedding first, head and MTP modules
/// last.
int64_t stage_of(const ParameterSpec& spec, const ModelConfig& config, int64_t stages) {
  const auto part = part_of(spec, config);
  if (part == ModelPart::kEmbedding) return 0;
  if (part == ModelPart::kHead || part == ModelPart::kMtp || spec.layer >= config.num_layers)
    return stages - 1;
  return std::max<int64_t>(spec.layer, 0) * stages / config.num_layers;
}

/// This rank's share of a parameter's elements.
double local_share(const ParameterSpec& spec, const Layout& layout) {
  double share = 1;
  if (spec.expert) return share / static_cast<double>(layout.expert);
  int64_t split_rows = 0, rows = 0;
  for (const auto& piece : spec.pieces) {
    const int64_t count = piece.row_end - piece.row_begin;
    rows += count;
    if (piece.tp_dim >= 0) split_rows += count;
  }
  const double split = static_cast<double>(split_rows) / static_cast<double>(rows);
  return share * (1 - split + split / static_cast<double>(layout.tensor));
}

void add_state(MemoryPlan& memory, const ParameterSpec& spec, const Config& config,
               const Layout& layout) {
  const double elements = static_cast<double>(spec.numel()) * local_share(spec, layout);
  const bool bf16 = config.model.dtype == DType::kBF16 && !spec.float32;
  const auto& optimizer = config.optimizer;
  const double replicas =
      static_cast<double>(spec.expert ? layout.tensor * layout.context * layout.data / layout.expert
                                      : layout.context * layout.data);
  const auto shard = [&](int64_t from_stage) {
    return layout.zero_stage >= from_stage ? 1 / replicas : 1.0;
  };
  memory.weights += elements * (bf16 ? 2 : 4) * shard(3);
  memory.gradients +=
      elements * (bf16 ? static_cast<double>(size_of(optimizer.gradient_dtype)) : 4) * shard(2);
  if (bf16 && optimizer.master_weights) memory.masters += elements * 4 * shard(1);
  memory.moments += elements * 2 * static_cast<double>(size_of(optimizer.moment_dtype)) * shard(1);
}

}  // namespace

double activation_bytes_per_token(const ModelConfig& config, int64_t layer, Recompute recompute) {
  const double element = config.dtype == DType::kBF16 ? 2 : 4;
  const auto hidden = static_cast<double>(config.hidden_size);
  if (recompute == Recompute::kFull) return hidden * element;
  const bool keep = recompute == Recompute::kNone;
  const auto& mla = config.mla;
  const auto heads = static_cast<double>(mla.num_heads);
  const auto head_qk = static_cast<double>(mla.qk_head_dim()),
             head_v = static_cast<double>(mla.v_head_dim);
  const auto latent =
      static_cast<double>(mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim);
  double elements = 2 * hidden;                      // the two residual sums, inputs of the norms
  elements += latent + heads * (head_qk + head_v);   // latents, q, the attention's output
  if (keep) elements += 2 * hidden + latent;         // normalised inputs and latents
  if (keep) elements += heads * (head_qk + head_v);  // k and v, else made again from the latent
  double bytes = elements * element + heads * 4;     // log-sum-exp
  const double swiglu = keep ? 3 : 2;  // gate, up and, unless made again, their product
  if (!config.is_moe_layer(layer))
    return bytes + swiglu * static_cast<double>(config.intermediate_size) * element;
  const auto& moe = config.moe;
  const auto inner = static_cast<double>(moe.moe_intermediate_size);
  const auto chosen = static_cast<double>(moe.num_experts_per_token);
  // Gathered inputs (unless made again) and the outputs before the weighted sum.
  bytes += chosen * ((keep ? 2 : 1) * hidden + swiglu * inner) * element;
  bytes += swiglu * inner * static_cast<double>(moe.num_shared_experts) * element;
  return bytes + static_cast<double>(moe.num_experts) * 2 * 4 + chosen * 12;
}

MemoryPlan plan_memory(const Config& config, const ParameterSet& parameters, const Layout& layout) {
  const auto& model = config.model;
  const int64_t stages = layout.pipeline;
  const double element = model.dtype == DType::kBF16 ? 2 : 4;
  const double tokens =
      static_cast<double>(config.training.micro_batch_size * config.data.sequence_length) /
      static_cast<double>(layout.context);
  const double per_replica = config.training.global_batch_size.at(0, 0) /
                             static_cast<double>(layout.data) /
                             static_cast<double>(config.training.micro_batch_size);
  MemoryPlan fullest;
  for (int64_t stage = 0; stage < stages; ++stage) {
    MemoryPlan memory{.stage = stage};
    for (const auto& parameter : parameters.parameters()) {
      if (parameter.spec.trainable && stage_of(parameter.spec, model, stages) == stage)
        add_state(memory, parameter.spec, config, layout);
    }
    double layers = 0, widest = 0;
    const int64_t last =
        model.num_layers + (stage == stages - 1 ? model.mtp.num_nextn_predict_layers : 0);
    for (int64_t layer = 0; layer < last; ++layer) {
      if (layer < model.num_layers && layer * stages / model.num_layers != stage) continue;
      layers += activation_bytes_per_token(model, layer, config.training.recompute);
      widest = std::max(widest, activation_bytes_per_token(model, layer, Recompute::kNone));
    }
    // Backward makes one layer's activations again beside those that were kept.
    const double again = config.training.recompute == Recompute::kNone ? 0 : widest;
    const double in_flight = std::clamp(per_replica, 1.0, static_cast<double>(stages - stage));
    memory.activations = tokens * (layers * in_flight + again) / static_cast<double>(layout.tensor);
    if (stage == stages - 1) {
      const double all = tokens * static_cast<double>(model.vocab_size) * element;
      memory.logits = std::min(all, 256.0 * (1 << 20)) / static_cast<double>(layout.tensor);
    }
    if (memory.total() > fullest.total()) fullest = memory;
  }
  return fullest;
}

}  // namespace dsv3
