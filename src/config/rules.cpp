// The rules between keys. Each message holds the equation with the values in it.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "config/draft.h"
#include "config/load.h"

namespace dsv3 {
namespace {

class Rules {
 public:
  template <typename... Args>
  void check(bool holds, std::vector<std::string_view> keys, fmt::format_string<Args...> format,
             Args&&... args) {
    if (!holds)
      broken_.push_back({std::move(keys), fmt::format(format, std::forward<Args>(args)...)});
  }

  /// `whole` must be a multiple of `part`.
  void divides(std::string_view part_key, int64_t part, std::string_view whole_key, int64_t whole) {
    check(whole % part == 0, {whole_key, part_key}, "{}({}) must be a multiple of {}({})",
          name(whole_key), whole, name(part_key), part);
  }

  std::vector<BrokenRule> take() { return std::move(broken_); }

  static std::string_view name(std::string_view key) { return key.substr(key.rfind('.') + 1); }

 private:
  std::vector<BrokenRule> broken_;
};

void check_model(const Config& config, Rules& rules) {
  const ModelConfig& model = config.model;
  rules.check(model.mla.qk_rope_head_dim % 2 == 0, {"model.mla.qk_rope_head_dim"},
              "qk_rope_head_dim({}) must be even: rotary embedding turns pairs",
              model.mla.qk_rope_head_dim);
  const RopeConfig& rope = model.rope;
  if (rope.type == RopeConfig::Type::kYarn) {
    rules.check(rope.beta_fast > rope.beta_slow, {"model.rope.beta_fast", "model.rope.beta_slow"},
                "beta_fast({}) must be more than beta_slow({})", rope.beta_fast, rope.beta_slow);
  }
  rules.check(config.data.sequence_length <= model.max_position_embeddings,
              {"data.sequence_length", "model.max_position_embeddings"},
              "sequence_length({}) must be at most model.max_position_embeddings({})",
              config.data.sequence_length, model.max_position_embeddings);
  const int64_t depth = model.mtp.num_nextn_predict_layers;
  rules.check(depth < config.data.sequence_length,
              {"model.mtp.num_nextn_predict_layers", "data.sequence_length"},
              "num_nextn_predict_layers({}) must be less than data.sequence_length({})", depth,
              config.data.sequence_length);
}

void check_experts(const Config& config, Rules& rules) {
  const MoeConfig& moe = config.model.moe;
  if (moe.num_experts == 0) return;
  const int64_t experts = moe.num_experts, chosen = moe.num_experts_per_token;
  rules.check(chosen <= experts, {"model.moe.num_experts_per_token", "model.moe.num_experts"},
              "num_experts_per_token({}) must be at most num_experts({})", chosen, experts);
  rules.divides("model.moe.n_group", moe.n_group, "model.moe.num_experts", experts);
  rules.check(moe.topk_group <= moe.n_group, {"model.moe.topk_group", "model.moe.n_group"},
              "topk_group({}) must be at most n_group({})", moe.topk_group, moe.n_group);
  rules.check(moe.first_k_dense_replace <= config.model.num_layers,
              {"model.moe.first_k_dense_replace", "model.num_layers"},
              "first_k_dense_replace({}) must be at most num_layers({})", moe.first_k_dense_replace,
              config.model.num_layers);
  if (experts % moe.n_group != 0 || moe.topk_group > moe.n_group) return;
  const int64_t per_group = experts / moe.n_group, reachable = moe.topk_group * per_group;
  rules.check(chosen <= reachable || chosen > experts,
              {"model.moe.num_experts_per_token", "model.moe.topk_group"},
              "num_experts_per_token({}) must be at most the experts of the chosen groups: "
              "topk_group({}) × num_experts({}) / n_group({}) = {}",
              chosen, moe.topk_group, experts, moe.n_group, reachable);
  const bool sums_two = moe.group_score == MoeConfig::GroupScore::kTop2Sum && moe.n_group > 1;
  rules.check(!sums_two || per_group >= 2,
              {"model.moe.n_group", "model.moe.num_experts", "model.moe.group_score"},
              "group_score top2_sum needs 2 experts in a group: num_experts({}) / n_group({}) = {}",
              experts, moe.n_group, per_group);
}

void check_parallel(const Config& config, Rules& rules) {
  const ParallelConfig& parallel = config.parallel;
  const ModelConfig& model = config.model;
  const std::string_view tp_key = "parallel.tensor_parallel_size";
  const int64_t tp = parallel.tensor_parallel_size;
  rules.divides(tp_key, tp, "model.mla.num_heads", model.mla.num_heads);
  rules.divides(tp_key, tp, "model.intermediate_size", model.intermediate_size);
  if (model.moe.num_experts > 0) {
    const int64_t shared = model.moe.num_shared_experts * model.moe.moe_intermediate_size;
    rules.check(shared % tp == 0,
                {tp_key, "model.moe.num_shared_experts", "model.moe.moe_intermediate_size"},
                "num_shared_experts({}) × moe_intermediate_size({}) = {} must be a multiple of "
                "tensor_parallel_size({})",
                model.moe.num_shared_experts, model.moe.moe_intermediate_size, shared, tp);
  }
  const int64_t ep = parallel.expert_parallel_size;
  const std::string_view ep_key = "parallel.expert_parallel_size";
  rules.check(ep == 1 || model.moe.num_experts > 0, {ep_key, "model.moe.num_experts"},
              "expert_parallel_size({}) needs experts, but num_experts is 0", ep);
  rules.divides(ep_key, ep, "model.moe.num_experts", model.moe.num_experts);
  // Experts fold over dp × cp × tp.
  const int64_t dp = parallel.data_parallel_size, cp = parallel.context_parallel_size;
  rules.check(dp == 0 || (dp * cp * tp) % ep == 0, {ep_key, "parallel.data_parallel_size"},
              "data_parallel_size({}) × context_parallel_size({}) × tensor_parallel_size({}) = {} "
              "must be a multiple of expert_parallel_size({})",
              dp, cp, tp, dp * cp * tp, ep);
  const int64_t pp = parallel.pipeline_parallel_size;
  rules.check(pp <= model.num_layers, {"parallel.pipeline_parallel_size", "model.num_layers"},
              "pipeline_parallel_size({}) must be at most num_layers({})", pp, model.num_layers);
  rules.divides("parallel.context_parallel_size", parallel.context_parallel_size,
                "data.sequence_length", config.data.sequence_length);
}

void check_data(const Config& config, Rules& rules) {
  const DataConfig& data = config.data;
  rules.check(data.validation_every != 1, {"data.validation_every"},
              "validation_every(1) holds every document out, expected 0 or at least 2");
  rules.check(data.validation_overlap < data.sequence_length,
              {"data.validation_overlap", "data.sequence_length"},
              "validation_overlap({}) must be less than sequence_length({})",
              data.validation_overlap, data.sequence_length);
  rules.check(data.validation.empty() || data.validation_every == 0,
              {"data.validation_every", "data.validation"},
              "validation and validation_every({}) are both given, keep one",
              data.validation_every);
}

void check_batch(const Config& config, Rules& rules) {
  const int64_t micro = config.training.micro_batch_size;
  const int64_t dp = std::max<int64_t>(1, config.parallel.data_parallel_size);
  const Schedule& batch = config.training.global_batch_size;
  for (size_t i = 0; i < batch.pieces.size(); ++i) {
    for (const double value : {batch.pieces[i].from, batch.pieces[i].to}) {
      const auto sequences = static_cast<int64_t>(value);
      if (sequences % (micro * dp) == 0) continue;
      rules.check(false, {"training.global_batch_size", "training.micro_batch_size"},
                  "global_batch_size({}) must be a multiple of micro_batch_size({}) × dp({}) = {}",
                  sequences, micro, dp, micro * dp);
      return;
    }
  }
}

std::string layout(const ParallelConfig& parallel, int64_t dp) {
  std::string text =
      fmt::format("tp({}) × pp({}) × cp({}) × dp({})", parallel.tensor_parallel_size,
                  parallel.pipeline_parallel_size, parallel.context_parallel_size, dp);
  if (parallel.data_parallel_size == 0 && dp > 1)
    text += fmt::format(" [dp for ep({})]", parallel.expert_parallel_size);
  return text;
}

/// The smallest dp with ep | dp · cp · tp, where dp is not given.
int64_t replicas(const ParallelConfig& parallel) {
  if (parallel.data_parallel_size > 0) return parallel.data_parallel_size;
  const int64_t ep = parallel.expert_parallel_size;
  return ep / std::gcd(ep, parallel.context_parallel_size * parallel.tensor_parallel_size);
}

}  // namespace

std::vector<BrokenRule> broken_rules(const Config& config) {
  Rules rules;
  check_model(config, rules);
  check_experts(config, rules);
  check_parallel(config, rules);
  check_data(config, rules);
  check_batch(config, rules);
  return rules.take();
}

int64_t num_processes(const ParallelConfig& parallel) {
  return parallel.tensor_parallel_size * parallel.pipeline_parallel_size *
         parallel.context_parallel_size * replicas(parallel);
}

void require_single_process(const ParallelConfig& parallel) {
  const int64_t processes = num_processes(parallel);
  if (processes == 1 && parallel.expert_parallel_size == 1) return;
  std::string overrides;
  const auto reset = [&](const char* key, int64_t value) {
    if (value > 1) overrides += fmt::format(" parallel.{}=1", key);
  };
  reset("tensor_parallel_size", parallel.tensor_parallel_size);
  reset("pipeline_parallel_size", parallel.pipeline_parallel_size);
  reset("context_parallel_size", parallel.context_parallel_size);
  reset("data_parallel_size", parallel.data_parallel_size);
  reset("expert_parallel_size", parallel.expert_parallel_size);
  invalid("parallel: {} = {} processes, but this run has 1; to fit one process add:{}",
          layout(parallel, replicas(parallel)), processes, overrides);
}

void require_cuda_widths(const ModelConfig& model) {
  if (model.dtype != DType::kBF16) return;
  const std::pair<const char*, int64_t> widths[] = {
      {"model.hidden_size", model.hidden_size},
      {"model.intermediate_size", model.intermediate_size},
      {"model.moe.moe_intermediate_size",
       model.moe.num_experts > 0 ? model.moe.moe_intermediate_size : 0}};
  for (const auto& [key, width] : widths) {
    require(width % 8 == 0,
            "{}: {}, but in bf16 on a GPU it must be a multiple of 8 (or take model.dtype=fp32)",
            key, width);
  }
}

}  // namespace dsv3
