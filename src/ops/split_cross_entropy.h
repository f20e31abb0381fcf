#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace dsv3::ops {

// Cross-entropy whose vocabulary is split over P parts (tensor parallelism), each of which holds
// the logits of its own ids. Phase 1 gives 16 bytes a token, the parts exchange them, phase 2 has
// the loss of the whole vocabulary and the gradient of its own logits. Nothing is recorded: the
// head that multiplies owns the graph, as in head_cross_entropy.

/// The part holds ids [begin, begin + V) of `total`.
struct VocabPart {
  int64_t begin = 0;
  int64_t total = 0;
};

/// Phase 1: logits [T, V], labels [T] int32 (global ids, kIgnoreLabel = no loss) → [T, 4] FP32:
/// largest logit, Σ e^(logit - largest), the label's logit (-inf where another part holds it), and
/// the bits of an int32, the largest logit's global id (of equal ones the lowest). Float64 logits:
/// float64, the id as a number.
at::Tensor vocab_statistics(const at::Tensor& logits, const at::Tensor& labels,
                            const VocabPart& part);

struct TokenLosses {
  at::Tensor losses;   // [T] FP32 (float64 with float64 logits), 0 where ignored, unscaled
  at::Tensor correct;  // [T] int32: 1 where the label is the argmax
};

/// Phase 2: statistics [P, T, 4] of all parts, in the order of their ids. With write_gradient the
/// logits are overwritten by scale · (softmax - onehot); `scale` (one FP32 on the device, float64
/// with float64 logits) is what a token weighs. Losses and correct have the same bits on every
/// part.
TokenLosses finish_cross_entropy_(const at::Tensor& logits, const at::Tensor& labels,
                                  const VocabPart& part, const at::Tensor& statistics,
                                  const at::Tensor& scale, bool write_gradient);

}  // namespace dsv3::ops
