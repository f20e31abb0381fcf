#include "mla/plain_mla.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_real.h>

#include <limits>

namespace dsv3::test {
namespace {

at::Tensor norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return x.mul(x.square().mean(-1, true).add(eps).rsqrt()).mul(weight);
}

/// Turns pairs (2i, 2i+1) of the last dim as complex numbers. x [T, H, R].
at::Tensor turn(const at::Tensor& x, const at::Tensor& positions, double theta) {
  const int64_t pairs = x.size(2) / 2;
  const auto exponent =
      at::arange(pairs, x.options().requires_grad(false)).mul(-2.0 / double(x.size(2)));
  const auto angle =
      positions.to(x.device(), at::kDouble).unsqueeze(1).mul(at::pow(theta, exponent));
  const auto phase = at::complex(angle.cos(), angle.sin()).unsqueeze(1);
  const auto z = at::view_as_complex(x.reshape({x.size(0), x.size(1), pairs, 2}).contiguous());
  return at::view_as_real(z.mul(phase)).reshape(x.sizes());
}

}  // namespace

PlainWeights plain_weights(const ParameterSet& parameters, const std::string& prefix) {
  PlainWeights weights;
  for (const auto& parameter : parameters.parameters()) {
    for (const auto& piece : parameter.spec.pieces) {
      const auto view = parameter.piece_view(piece, parameter.value().detach());
      weights[piece.name.substr(prefix.size())] =
          view.to(at::kCPU, at::kDouble).clone().requires_grad_(true);
    }
  }
  return weights;
}

at::Tensor plain_mla(const ModelConfig& config, const PlainWeights& weights, const at::Tensor& x,
                     int64_t num_sequences, const at::Tensor& positions,
                     const at::Tensor& documents, double scale) {
  const auto& c = config.mla;
  const int64_t tokens = x.size(0), s = tokens / num_sequences, h = c.num_heads;
  const int64_t n = c.qk_nope_head_dim, r = c.qk_rope_head_dim, v_dim = c.v_head_dim;
  const auto project = [&](const at::Tensor& input, const char* name) {
    return at::einsum("tk,nk->tn", {input, weights.at(std::string(name) + ".weight")});
  };
  at::Tensor q;
  if (c.q_lora_rank > 0) {
    q = project(norm(project(x, "q_a_proj"), weights.at("q_a_layernorm.weight"), c.latent_norm_eps),
                "q_b_proj");
  } else {
    q = project(x, "q_proj");
  }
  q = q.reshape({tokens, h, n + r});
  const auto kv_a = project(x, "kv_a_proj_with_mqa");
  const auto latent = norm(kv_a.narrow(1, 0, c.kv_lora_rank), weights.at("kv_a_layernorm.weight"),
                           c.latent_norm_eps);
  const auto kv = project(latent, "kv_b_proj").reshape({tokens, h, n + v_dim});
  const auto q_rope = turn(q.narrow(2, n, r), positions, config.rope.theta);
  const auto k_rope =
      turn(kv_a.narrow(1, c.kv_lora_rank, r).unsqueeze(1), positions, config.rope.theta).squeeze(1);

  std::vector<at::Tensor> rows;
  for (int64_t begin = 0; begin < tokens; begin += s) {
    const auto part = [&](const at::Tensor& all) { return all.narrow(0, begin, s); };
    const auto k_nope = part(kv).narrow(2, 0, n), v = part(kv).narrow(2, n, v_dim);
    const auto scores = at::einsum("ihn,jhn->hij", {part(q).narrow(2, 0, n), k_nope})
                            .add(at::einsum("ihr,jr->hij", {part(q_rope), part(k_rope)}))
                            .mul(scale);
    const auto index = at::arange(s);
    auto hidden = index.unsqueeze(0).gt(index.unsqueeze(1));
    if (documents.defined()) {
      const auto own = part(documents);
      hidden = hidden.logical_or(own.unsqueeze(0).ne(own.unsqueeze(1)));
    }
    const auto weight =
        at::softmax(scores.masked_fill(hidden, -std::numeric_limits<double>::infinity()), 2);
    rows.push_back(at::einsum("hij,jhv->ihv", {weight, v}).reshape({s, h * v_dim}));
  }
  return project(at::cat(rows), "o_proj");
}

}  // namespace dsv3::test
