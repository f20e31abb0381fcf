#pragma once

#include "ops/weight.h"

namespace dsv3::ops {

inline constexpr int32_t kIgnoreLabel = -100;

/// The head and its loss in chunks of tokens, so that the logits [T, V] never exist at once.
/// hidden [T, D], weight [V, D], labels [T] int32 (kIgnoreLabel = no loss).
struct HeadLoss {
  at::Tensor objective;  // scalar FP32: scale · Σ -log softmax(hidden · Wᵀ)[label]; what backward
                         // starts from
  at::Tensor loss_sum;  // scalar FP32, detached: Σ over the valid labels, unscaled
  at::Tensor correct;   // scalar int64, detached: valid positions where the argmax is the label
};

/// `scale` (scalar FP32 tensor on the device) is what one token's loss weighs in the objective: 1 /
/// valid tokens of the GLOBAL batch, × λ/D for an MTP depth. Note: when gradients are recorded,
/// they are formed in forward, chunk by chunk (logits are overwritten by their gradient): the
/// weight's gradient is added THEN, and backward only returns d hidden times the incoming gradient,
/// which therefore must be 1 (it is, when objectives are summed). Never recompute it.
HeadLoss head_cross_entropy(const at::Tensor& hidden, const Weight& weight,
                            const at::Tensor& labels, const at::Tensor& scale);

/// The loss of logits [T, V] that exist already, contiguous; otherwise as head_cross_entropy. When
/// gradients are recorded, the logits' memory holds their gradient afterwards, and backward returns
/// it times the incoming gradient (in place): their maker must not have saved them, and nobody may
/// read them again.
HeadLoss cross_entropy_(const at::Tensor& logits, const at::Tensor& labels,
                        const at::Tensor& scale);

/// How many tokens' logits exist at once: a pure function. CUDA: 1 GiB of logits, so that the
/// products stay large and the weight's gradient is seldom added; CPU: 4 MiB, so that they stay in
/// the cache, but 512 tokens at least, because each chunk adds the weight's whole gradient to its
/// bucket.
int64_t head_chunk_tokens(int64_t num_tokens, int64_t vocab, int64_t element_size, bool cuda);

namespace reference {
/// Per-token losses [T] (0 where ignored) from logits [T, V]; float64-capable, differentiable.
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& labels);
}  // namespace reference

}  // namespace dsv3::ops
