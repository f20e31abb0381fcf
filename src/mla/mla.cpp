#include "mla/mla.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/split_with_sizes.h>

#include "base/error.h"
#include "mla/absorbed.h"
#include "mla/latent_cache.h"
#include "ops/attention.h"
#include "ops/autograd.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"

namespace dsv3 {
namespace {

/// A matrix [rows, columns] whose checkpoint tensors stand one below the other.
struct Part {
  const char* name;  // of the checkpoint's tensor, behind the layer's prefix
  int64_t rows;
  int tp_dim;
};

Parameter* declare_matrix(ParameterSet& parameters, const ModelConfig& config, int64_t layer,
                          const std::string& prefix, const std::string& name, int64_t columns,
                          const std::vector<Part>& parts) {
  ParameterSpec spec{.name = prefix + name + ".weight", .shape = {0, columns}, .pieces = {}};
  for (const auto& part : parts) {
    const int64_t begin = spec.shape[0];
    spec.shape[0] += part.rows;
    spec.pieces.push_back({.name = prefix + part.name + ".weight",
                           .row_begin = begin,
                           .row_end = spec.shape[0],
                           .tp_dim = part.tp_dim});
  }
  spec.layer = layer;
  spec.init_std = config.initializer_range;
  return &parameters.declare(std::move(spec));
}

Parameter* declare_norm(ParameterSet& parameters, int64_t layer, const std::string& name,
                        int64_t width) {
  ParameterSpec spec{.name = name, .shape = {width}, .pieces = {{.name = name, .row_end = width}}};
  spec.layer = layer;
  spec.decay = false;
  spec.init = Init::kOnes;
  return &parameters.declare(std::move(spec));
}

/// The down-projections of a layer: q is the latent with q_lora, else the full query.
struct Compressed {
  at::Tensor q;       // [T, Q] or [T, H·(N+R)]
  at::Tensor latent;  // [T, C], not yet normalised
  at::Tensor k_rope;  // [T, R], not yet rotated
};

Compressed compress(const Mla& mla, const ops::Remakable& x) {
  const auto& c = mla.config->mla;
  if (mla.qkv_a_proj != nullptr) {
    const at::Tensor all = ops::linear(x, mla.qkv_a_proj->weight);
    const auto parts =
        at::split_with_sizes(all, {c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim}, 1);
    return {parts[0], parts[1], parts[2]};
  }
  const at::Tensor q = ops::linear(x, mla.q_proj->weight);
  const at::Tensor kv = ops::linear(x, mla.kv_a_proj->weight);
  const auto parts = at::split_with_sizes(kv, {c.kv_lora_rank, c.qk_rope_head_dim}, 1);
  return {q, parts[0], parts[1]};
}

/// Keeps the value itself unless the policy recomputes it.
ops::Remakable apply_policy(ops::Remakable x, Recompute policy) {
  if (policy == Recompute::kNone) x.remake = nullptr;
  return x;
}

/// From the normalised q latent (or the full query) to rotated heads [T, H, N + R].
at::Tensor query_heads(const Mla& mla, const ops::Remakable& q, const ForwardContext& context) {
  const auto& c = mla.config->mla;
  const at::Tensor full = mla.q_b_proj != nullptr ? ops::linear(q, mla.q_b_proj->weight) : q.value;
  // In place: the product is fresh, and linear does not save its result.
  return ops::rope_query_(full.view({full.size(0), c.num_heads, c.qk_head_dim()}), context.cos_sin,
                          context.positions);
}

/// From the normalised latent to k [T, H, N + R] and v [T, H, Vd].
std::tuple<at::Tensor, at::Tensor> key_value_heads(const Mla& mla, const ops::Remakable& latent,
                                                   const at::Tensor& k_rope,
                                                   const ForwardContext& context) {
  const auto& c = mla.config->mla;
  const at::Tensor kv = ops::linear(latent, mla.kv_b_proj->weight);
  return ops::rope_key_value(kv.view({kv.size(0), c.num_heads, c.qk_nope_head_dim + c.v_head_dim}),
                             k_rope, context.cos_sin, context.positions, c.v_head_dim);
}

/// Keys and values for attention's backward, made from the kept latents instead of being kept; q
/// too where it comes from a latent (the "MLA up-projection" of the technical report §3.2.3).
std::function<ops::AttentionInputs()> remake_heads(const Mla& mla, const ops::Remakable& q_latent,
                                                   const at::Tensor& q,
                                                   const ops::Remakable& latent,
                                                   const at::Tensor& k_rope,
                                                   const ForwardContext& context) {
  const bool from_latent = mla.q_b_proj != nullptr && q_latent.remake;
  const at::Tensor kept = from_latent ? at::Tensor() : q.detach();
  return [mla, kept, k_rope = k_rope.detach(), remake_q = q_latent.remake,
          remake_latent = latent.remake, context] {
    const ops::NoRecord guard;
    const at::Tensor again = kept.defined() ? kept : query_heads(mla, {remake_q(), {}}, context);
    const auto [k, v] = key_value_heads(mla, {remake_latent(), {}}, k_rope, context);
    return ops::AttentionInputs{again, k, v};
  };
}

at::Tensor attend_cached(const Mla& mla, const at::Tensor& q, const at::Tensor& latent,
                         const at::Tensor& k_rope, const ForwardContext& context) {
  const auto& c = mla.config->mla;
  require(!context.documents.defined(),
          "[mla] a latent cache holds one document per sequence: documents must be undefined");
  const ops::NoRecord guard;
  const at::Tensor key = ops::rope_query(k_rope.unsqueeze(1), context.cos_sin, context.positions);
  const at::Tensor row = at::cat({latent, key.squeeze(1)}, 1);
  const at::Tensor latents = context.cache->append(
      mla.kv_b_proj->spec.layer,
      row.view({context.num_sequences, context.sequence_length, row.size(1)}));
  return absorbed_attention(q, latents, mla.kv_b_proj->value(), c.v_head_dim,
                            softmax_scale(*mla.config));
}

}  // namespace

Mla Mla::declare(ParameterSet& parameters, const ModelConfig& config, int64_t layer,
                 const std::string& prefix) {
  const auto& c = config.mla;
  DSV3_CHECK(c.num_heads > 0, "model.mla.num_heads is not resolved");
  const int64_t d = config.hidden_size;
  const int64_t q_rows = c.num_heads * c.qk_head_dim();
  const int64_t kv_a_rows = c.kv_lora_rank + c.qk_rope_head_dim;
  const auto matrix = [&](const std::string& name, int64_t columns,
                          const std::vector<Part>& parts) {
    return declare_matrix(parameters, config, layer, prefix, name, columns, parts);
  };
  Mla mla;
  mla.config = &config;
  if (c.q_lora_rank > 0) {
    mla.qkv_a_proj = matrix(
        "qkv_a_proj", d, {{"q_a_proj", c.q_lora_rank, -1}, {"kv_a_proj_with_mqa", kv_a_rows, -1}});
    mla.q_a_norm = declare_norm(parameters, layer, prefix + "q_a_layernorm.weight", c.q_lora_rank);
    mla.q_b_proj = matrix("q_b_proj", c.q_lora_rank, {{"q_b_proj", q_rows, 0}});
  } else {
    mla.q_proj = matrix("q_proj", d, {{"q_proj", q_rows, 0}});
    mla.kv_a_proj = matrix("kv_a_proj_with_mqa", d, {{"kv_a_proj_with_mqa", kv_a_rows, -1}});
  }
  mla.kv_a_norm = declare_norm(parameters, layer, prefix + "kv_a_layernorm.weight", c.kv_lora_rank);
  mla.kv_b_proj = matrix("kv_b_proj", c.kv_lora_rank,
                         {{"kv_b_proj", c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), 0}});
  mla.o_proj = matrix("o_proj", c.num_heads * c.v_head_dim, {{"o_proj", d, 1}});
  return mla;
}

at::Tensor Mla::forward(const ops::Remakable& x, const ForwardContext& context) const {
  const auto& c = config->mla;
  const int64_t tokens = x.value.size(0);
  require(tokens == context.num_sequences * context.sequence_length,
          "[mla] x has {} tokens, but {} sequences × {} tokens were announced", tokens,
          context.num_sequences, context.sequence_length);
  const auto compressed = compress(*this, x);
  ops::Remakable q_latent{compressed.q, {}};
  if (q_a_norm != nullptr) {
    q_latent = apply_policy(ops::rms_norm(compressed.q, q_a_norm->weight, c.latent_norm_eps),
                            context.recompute);
  }
  const at::Tensor q = query_heads(*this, q_latent, context);
  const auto latent = apply_policy(
      ops::rms_norm(compressed.latent, kv_a_norm->weight, c.latent_norm_eps), context.recompute);
  if (context.cache != nullptr) {
    const at::Tensor out = attend_cached(*this, q, latent.value, compressed.k_rope, context);
    return ops::linear(out.view({tokens, c.num_heads * c.v_head_dim}), o_proj->weight);
  }
  const auto [k, v] = key_value_heads(*this, latent, compressed.k_rope, context);
  ops::AttentionOptions options{.num_sequences = context.num_sequences,
                                .scale = softmax_scale(*config),
                                .documents = context.documents,
                                .remake = {}};
  if (latent.remake && ops::recording({q, k, v})) {
    options.remake = remake_heads(*this, q_latent, q, latent, compressed.k_rope, context);
  }
  const at::Tensor out = ops::attention({q, k, v}, options);
  return ops::linear(out.view({tokens, c.num_heads * c.v_head_dim}), o_proj->weight);
}

}  // namespace dsv3
