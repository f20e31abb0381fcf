#include "mla/absorbed.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>

#include <limits>

#include "base/error.h"

namespace dsv3 {

at::Tensor absorbed_attention(const at::Tensor& q, const at::Tensor& latents,
                              const at::Tensor& kv_b, int64_t v_head_dim, double scale) {
  const int64_t num_sequences = latents.size(0), length = latents.size(1), c = kv_b.size(1);
  const int64_t tokens = q.size(0), heads = q.size(1), rope = latents.size(2) - c;
  const int64_t nope = q.size(2) - rope, s = tokens / num_sequences;
  DSV3_CHECK(tokens == s * num_sequences && s <= length,
             "{} query tokens of {} sequences meet latents of {} tokens each", tokens,
             num_sequences, length);
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor up = kv_b.view({heads, nope + v_head_dim, c});  // per head: W_uk, then W_uv

  // q_latent[h] = q_nope[h] · W_uk[h]: [H, T, C]
  const at::Tensor by_head = q.transpose(0, 1);
  const at::Tensor q_latent = at::bmm(by_head.narrow(2, 0, nope), up.narrow(1, 0, nope));
  const at::Tensor query = at::cat({q_latent, by_head.narrow(2, nope, rope)}, 2)
                               .view({heads, num_sequences, s, c + rope})
                               .transpose(0, 1)
                               .reshape({num_sequences, heads * s, c + rope});

  const at::Tensor keys = latents.to(wide);  // [B, L, C + R]
  at::Tensor scores = at::bmm(query.to(wide), keys.transpose(1, 2)).mul_(scale);
  const at::Tensor later =
      at::ones({s, length}, scores.options().dtype(at::kBool)).triu(length - s + 1);
  scores = scores.view({num_sequences, heads, s, length})
               .masked_fill_(later, -std::numeric_limits<double>::infinity())
               .view({num_sequences, heads * s, length});
  const at::Tensor mixed = at::bmm(at::softmax(scores, -1), keys.narrow(2, 0, c))
                               .to(q.scalar_type())
                               .view({num_sequences, heads, s, c})
                               .transpose(0, 1)
                               .reshape({heads, tokens, c});

  // out[h] = mixed[h] · W_uv[h]ᵀ: [H, T, Vd]
  const at::Tensor out = at::bmm(mixed, up.narrow(1, nope, v_head_dim).transpose(1, 2));
  return out.transpose(0, 1).contiguous();
}

}  // namespace dsv3
