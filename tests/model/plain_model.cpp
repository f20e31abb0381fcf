#include "model/plain_model.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/triu.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace dsv3::testing {
namespace {

const auto kDouble = at::TensorOptions(at::kDouble);

at::Tensor swish(const at::Tensor& x) {
  return x * at::sigmoid(x);
}

std::vector<double> row(const at::Tensor& x) {
  const at::Tensor values = x.detach().contiguous();
  const auto* data = values.const_data_ptr<double>();
  return {data, data + values.numel()};
}

/// The k largest by value, ties to the lower index; `narrowest` learns the gap behind the last one.
std::vector<int64_t> largest(const std::vector<double>& values, int64_t k, double& narrowest) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
  });
  const auto chosen = static_cast<size_t>(k);
  if (chosen < order.size()) {
    narrowest = std::min(narrowest, values[static_cast<size_t>(order[chosen - 1])] -
                                        values[static_cast<size_t>(order[chosen])]);
  }
  order.resize(chosen);
  return order;
}

/// Which experts one token goes to, from its biased scores (report §2.1.2: groups by the sum of
/// their top 2).
std::vector<int64_t> choose(const MoeConfig& moe, std::vector<double> biased, double& narrowest) {
  const auto group_size = static_cast<size_t>(moe.num_experts / moe.n_group);
  std::vector<double> group_scores;
  for (int64_t group = 0; group < moe.n_group; ++group) {
    std::vector<double> members(biased.begin() + group * static_cast<int64_t>(group_size),
                                biased.begin() + (group + 1) * static_cast<int64_t>(group_size));
    std::ranges::sort(members, std::greater<>());
    group_scores.push_back(members[0] + (members.size() > 1 ? members[1] : 0.0));
  }
  const auto groups = largest(group_scores, moe.topk_group, narrowest);
  for (size_t expert = 0; expert < biased.size(); ++expert) {
    if (std::ranges::find(groups, static_cast<int64_t>(expert / group_size)) == groups.end()) {
      biased[expert] = -INFINITY;
    }
  }
  return largest(biased, moe.num_experts_per_token, narrowest);
}

}  // namespace

PlainModel::PlainModel(const ModelConfig& config, const ParameterSet& parameters)
    : config_(config) {
  for (const auto& parameter : parameters.parameters()) {
    values[parameter.spec.name] = parameter.value()
                                      .detach()
                                      .cpu()
                                      .to(at::kDouble)
                                      .clone()
                                      .requires_grad_(parameter.spec.trainable);
  }
}

at::Tensor PlainModel::norm(const at::Tensor& x, const std::string& name, double eps) const {
  return x * at::rsqrt((x * x).mean(-1, true) + eps) * values.at(name);
}

// x [S, …, R]: pair (2i, 2i+1) of position p turns by p · theta^(-2i/R).
at::Tensor PlainModel::rotate(const at::Tensor& x) const {
  const int64_t length = x.size(0), dims = x.size(-1);
  const at::Tensor frequency = at::pow(
      config_.rope.theta, at::arange(0, dims, 2, kDouble) * (-1.0 / static_cast<double>(dims)));
  at::Tensor angle = at::outer(at::arange(length, kDouble), frequency);
  while (angle.dim() < x.dim()) angle = angle.unsqueeze(1);
  // The model's rotary table is FP32 whatever its dtype (ops/rope.h).
  const at::Tensor cos = angle.cos().to(at::kFloat).to(at::kDouble);
  const at::Tensor sin = angle.sin().to(at::kFloat).to(at::kDouble);
  const at::Tensor even = x.slice(-1, 0, dims, 2), odd = x.slice(-1, 1, dims, 2);
  return at::stack({even * cos - odd * sin, even * sin + odd * cos}, -1).flatten(-2);
}

at::Tensor PlainModel::attention(const at::Tensor& x, int64_t layer) const {
  const MlaConfig& mla = config_.mla;
  const std::string prefix = fmt::format("model.layers.{}.self_attn.", layer);
  const int64_t length = x.size(0), heads = mla.num_heads, nope = mla.qk_nope_head_dim;
  const auto weight = [&](const std::string& name) { return values.at(prefix + name).t(); };
  at::Tensor q, kv_a;
  if (mla.q_lora_rank > 0) {
    const at::Tensor joined = at::matmul(x, weight("qkv_a_proj.weight"));
    q = at::matmul(norm(joined.slice(1, 0, mla.q_lora_rank), prefix + "q_a_layernorm.weight",
                        mla.latent_norm_eps),
                   weight("q_b_proj.weight"));
    kv_a = joined.slice(1, mla.q_lora_rank, joined.size(1));
  } else {
    q = at::matmul(x, weight("q_proj.weight"));
    kv_a = at::matmul(x, weight("kv_a_proj_with_mqa.weight"));
  }
  q = q.view({length, heads, mla.qk_head_dim()});
  q = at::cat({q.slice(2, 0, nope), rotate(q.slice(2, nope, mla.qk_head_dim()))}, 2);
  const at::Tensor latent = norm(kv_a.slice(1, 0, mla.kv_lora_rank),
                                 prefix + "kv_a_layernorm.weight", mla.latent_norm_eps);
  const at::Tensor shared_key = rotate(kv_a.slice(1, mla.kv_lora_rank, kv_a.size(1)));
  const at::Tensor kv =
      at::matmul(latent, weight("kv_b_proj.weight")).view({length, heads, nope + mla.v_head_dim});
  const at::Tensor mask = at::triu(at::ones({length, length}, kDouble), 1).to(at::kBool);
  std::vector<at::Tensor> outputs;
  for (int64_t head = 0; head < heads; ++head) {
    const at::Tensor key = at::cat({kv.select(1, head).slice(1, 0, nope), shared_key}, 1);
    const at::Tensor scores =
        at::matmul(q.select(1, head), key.t()) / std::sqrt(static_cast<double>(mla.qk_head_dim()));
    outputs.push_back(at::matmul(at::softmax(scores.masked_fill(mask, -INFINITY), -1),
                                 kv.select(1, head).slice(1, nope, nope + mla.v_head_dim)));
  }
  return at::matmul(at::cat(outputs, 1), weight("o_proj.weight"));
}

at::Tensor PlainModel::mlp(const at::Tensor& x, const std::string& prefix) const {
  const at::Tensor both = at::matmul(x, values.at(prefix + "gate_up_proj.weight").t());
  const auto halves = both.chunk(2, 1);
  return at::matmul(swish(halves[0]) * halves[1], values.at(prefix + "down_proj.weight").t());
}

at::Tensor PlainModel::moe(const at::Tensor& x, int64_t layer, int64_t num_valid, Losses& losses,
                           std::vector<int64_t>& counts) const {
  const MoeConfig& moe = config_.moe;
  const std::string prefix = fmt::format("model.layers.{}.mlp.", layer);
  const at::Tensor scores = at::sigmoid(at::matmul(x, values.at(prefix + "gate.weight").t()));
  const at::Tensor biased = scores + values.at(prefix + "gate.e_score_correction_bias");
  const at::Tensor gate_up = values.at(prefix + "experts.gate_up_proj");
  const at::Tensor down = values.at(prefix + "experts.down_proj");
  std::vector<at::Tensor> outputs;
  std::vector<double> raw_counts(static_cast<size_t>(moe.num_experts), 0.0);
  for (int64_t token = 0; token < x.size(0); ++token) {
    at::Tensor total = at::zeros({}, kDouble);
    const auto chosen = choose(moe, row(biased[token]), losses.narrowest);
    for (const int64_t expert : chosen) total = total + scores[token][expert];
    at::Tensor y = at::zeros({x.size(1)}, kDouble);
    for (const int64_t expert : chosen) {
      at::Tensor gate = scores[token][expert];
      if (moe.norm_topk_prob) gate = gate / (total + 1e-20);
      const auto halves = at::matmul(gate_up[expert], x[token]).chunk(2, 0);
      y = y +
          moe.routed_scaling_factor * gate * at::matmul(down[expert], swish(halves[0]) * halves[1]);
      if (token < num_valid) ++counts[static_cast<size_t>(expert)];
    }
    outputs.push_back(y);
    if (token >= num_valid) continue;
    for (const int64_t expert :
         largest(row(scores[token]), moe.num_experts_per_token, losses.narrowest)) {
      ++raw_counts[static_cast<size_t>(expert)];
    }
  }
  if (num_valid > 0) {
    const at::Tensor share = (scores / scores.sum(1, true)).slice(0, 0, num_valid).mean(0);
    const at::Tensor frequency = at::tensor(raw_counts, kDouble) *
                                 static_cast<double>(moe.num_experts) /
                                 static_cast<double>(moe.num_experts_per_token * num_valid);
    losses.balance_sum = losses.balance_sum + (frequency * share).sum();
  }
  at::Tensor y = at::stack(outputs);
  if (moe.num_shared_experts > 0) y = y + mlp(x, prefix + "shared_experts.");
  return y;
}

at::Tensor PlainModel::block(const at::Tensor& x, int64_t layer, bool is_moe, int64_t num_valid,
                             Losses& losses, std::vector<int64_t>* counts) const {
  const std::string prefix = fmt::format("model.layers.{}.", layer);
  const double eps = config_.rms_norm_eps;
  const at::Tensor h = x + attention(norm(x, prefix + "input_layernorm.weight", eps), layer);
  const at::Tensor n = norm(h, prefix + "post_attention_layernorm.weight", eps);
  return h + (is_moe ? moe(n, layer, num_valid, losses, *counts) : mlp(n, prefix + "mlp."));
}

at::Tensor PlainModel::token_losses(const at::Tensor& hidden,
                                    const std::vector<int64_t>& labels) const {
  const std::string name =
      config_.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  const at::Tensor log_p = at::log_softmax(at::matmul(hidden, values.at(name).t()), -1);
  at::Tensor sum = at::zeros({}, kDouble);
  for (size_t i = 0; i < labels.size(); ++i) {
    if (labels[i] >= 0) sum = sum - log_p[static_cast<int64_t>(i)][labels[i]];
  }
  return sum;
}

PlainModel::Losses PlainModel::losses(const std::vector<std::vector<int64_t>>& tokens,
                                      const std::vector<std::vector<int64_t>>& labels,
                                      int64_t mtp_depths, const std::vector<int64_t>& lengths) {
  Losses losses;
  losses.main_sum = losses.balance_sum = at::zeros({}, kDouble);
  losses.mtp_sums.assign(static_cast<size_t>(mtp_depths), at::zeros({}, kDouble));
  const at::Tensor embedding = values.at("model.embed_tokens.weight");
  const double eps = config_.rms_norm_eps;
  const auto embed = [&](const std::vector<int64_t>& ids) {
    return embedding.index_select(0, at::tensor(ids, at::TensorOptions(at::kLong)));
  };
  int64_t num_moe = 0;
  for (int64_t layer = 0; layer < config_.num_layers; ++layer)
    num_moe += config_.is_moe_layer(layer);
  losses.counts.assign(static_cast<size_t>(num_moe + mtp_depths),
                       std::vector<int64_t>(static_cast<size_t>(config_.moe.num_experts), 0));
  for (size_t sequence = 0; sequence < tokens.size(); ++sequence) {
    size_t moe_index = 0;
    const auto valid =
        lengths.empty() ? static_cast<int64_t>(tokens[sequence].size()) : lengths[sequence];
    at::Tensor x = embed(tokens[sequence]);
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
      const bool is_moe = config_.is_moe_layer(layer);
      x = block(x, layer, is_moe, valid, losses, is_moe ? &losses.counts[moe_index++] : nullptr);
    }
    at::Tensor hidden = norm(x, "model.norm.weight", eps);
    at::Tensor previous = config_.mtp.input_after_final_norm ? hidden : x;
    losses.main_sum = losses.main_sum + token_losses(hidden, labels[sequence]);
    for (int64_t depth = 1; depth <= mtp_depths; ++depth) {
      // Position i joins its hidden state with token i + depth and predicts what label i + depth
      // says.
      const auto length = static_cast<int64_t>(tokens[sequence].size());
      std::vector<int64_t> ids(tokens[sequence].size(), 0), targets(tokens[sequence].size(), -1);
      for (int64_t i = 0; i + depth < length; ++i) {
        ids[static_cast<size_t>(i)] = tokens[sequence][static_cast<size_t>(i + depth)];
        targets[static_cast<size_t>(i)] = labels[sequence][static_cast<size_t>(i + depth)];
      }
      const int64_t layer = config_.num_layers + depth - 1;
      const std::string prefix = fmt::format("model.layers.{}.", layer);
      const at::Tensor joined = at::cat({norm(embed(ids), prefix + "enorm.weight", eps),
                                         norm(previous, prefix + "hnorm.weight", eps)},
                                        1);
      x = block(at::matmul(joined, values.at(prefix + "eh_proj.weight").t()), layer, true,
                std::max<int64_t>(0, valid - depth), losses, &losses.counts[moe_index++]);
      hidden = norm(x, prefix + "shared_head.norm.weight", eps);
      previous = config_.mtp.input_after_final_norm ? hidden : x;
      auto& sum = losses.mtp_sums[static_cast<size_t>(depth - 1)];
      sum = sum + token_losses(hidden, targets);
    }
  }
  return losses;
}

}  // namespace dsv3::testing
