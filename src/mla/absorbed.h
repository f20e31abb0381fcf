#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace dsv3 {

/// Attention of new tokens over the latents of all tokens so far, without expanding keys and values
/// (arXiv:2405.04434 §2.1.2): W_uk goes into the query and W_uv behind the sum, so every head reads
/// the same [L, C + R] rows.
/// q [B·S, H, N + R] rotated; latents [B, L, C + R], the last S rows of a sequence being the new
/// tokens'; kv_b [H·(N + Vd), C] → [B·S, H, Vd]. Token i of the S sees the latents up to L - S + i.
/// Scores and softmax in FP32 (float64 inputs: float64). No gradient.
at::Tensor absorbed_attention(const at::Tensor& q, const at::Tensor& latents,
                              const at::Tensor& kv_b, int64_t v_head_dim, double scale);

}  // namespace dsv3
