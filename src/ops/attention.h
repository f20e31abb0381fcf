#pragma once

#include "ops/weight.h"

namespace dsv3::ops {

/// Causal softmax attention, multi-head, over B sequences of S tokens laid end to end (T = B·S).
/// q, k [T, H, Dqk], v [T, H, Dv] (any strides with a contiguous last dim) → [T, H, Dv] contiguous.
/// `documents` [T] int32 or undefined: tokens attend only within their own document.
/// `remake`, when given, returns q, k, v again in backward (selective recomputation): they are not
/// kept.
struct AttentionInputs {
  at::Tensor q, k, v;
};
struct AttentionOptions {
  int64_t num_sequences = 1;  // B
  double scale = 1.0;         // on q·k before the softmax
  at::Tensor documents;
  std::function<AttentionInputs()> remake;
};
at::Tensor attention(const AttentionInputs& inputs, const AttentionOptions& options);

/// Forward calls of attention() in this process so far, and those of them that did not take the
/// device's fast body (our tiles on the CPU, cuDNN on CUDA) but a slower one: LibTorch's
/// memory-efficient kernel, or the reference. Any thread may ask.
struct AttentionCalls {
  int64_t all = 0;
  int64_t fallbacks = 0;
};
AttentionCalls attention_calls();

namespace reference {
/// Builds the whole score matrix; float64-capable, differentiable.
at::Tensor attention(const AttentionInputs& inputs, const AttentionOptions& options);
}  // namespace reference

}  // namespace dsv3::ops
