#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/kernel.h"

namespace dsv3::kernels {

inline constexpr int32_t kIgnoredLabel = -100;

/// losses[t] = log Σ_v e^logits[t, v] - logits[t, label]; the logits are then overwritten by their
/// gradient scale · (softmax - onehot). FP32 sums whatever the dtype. Ignored labels: loss 0,
/// gradient 0, not correct. A label outside [0, V) that is not kIgnoredLabel: std::invalid_argument
/// on the host, a NaN loss on CUDA. Reads T·V twice (the second time mostly from cache), writes
/// T·V: memory bound.
struct CrossEntropy {
  int64_t num_tokens;     // T
  int64_t vocab;          // V
  DType dtype;            // of logits: kF32 or kBF16
  void* logits;           // [T, V] contiguous
  const int32_t* labels;  // [T]
  const float* scale;   // [1] on the kernel's device: weight of one token; read when write_gradient
  bool write_gradient;  // overwrite the logits
  float* losses;        // [T], unscaled
  int32_t* correct;  // [T]: 1 where the label is the argmax (of equal logits the lowest id), else 0
};

DSV3_DECLARE_KERNEL(cross_entropy, CrossEntropy)

}  // namespace dsv3::kernels
