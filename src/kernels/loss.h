#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/kernel.h"

namespace dsv3::kernels {

inline constexpr int32_t kIgnoredLabel = -100;

/// losses[t] = log Σ_v e^logits[t, v] - logits[t, label]; the logits are then overwritten by their
/// gradient scale · (softmax - onehot). FP32 sums whatever the dtype. Ignored labels: loss 0,
/// gradient 0, not correct. A label outside [0, V) that is not kIgnoredLabel: std::invalid_argument
/// on the host, a NaN loss and zero gradients on CUDA. Reads and writes T·V: memory bound.
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

/// What one part of the vocabulary knows of a token.
struct VocabStatistics {
  float largest;      // max of its logits, -inf for none
  float sum;          // Σ e^(logit - largest)
  float label_logit;  // the label's logit where the part holds it, else -inf
  int32_t argmax;     // global id of the largest logit, of equal ones the lowest; -1 for none
};

/// Split over the vocabulary, phase 1: a part holds ids [vocab_begin, vocab_begin + V) of
/// total_vocab. Labels are global ids, valid as in CrossEntropy. Reads T·V.
struct CrossEntropyStatistics {
  int64_t num_tokens;           // T
  int64_t vocab;                // V of this part
  int64_t vocab_begin;          // its first id
  int64_t total_vocab;          // of all parts
  DType dtype;                  // of logits: kF32 or kBF16
  const void* logits;           // [T, V] contiguous
  const int32_t* labels;        // [T]
  VocabStatistics* statistics;  // [T]
};

/// Phase 2, with the statistics of all parts gathered, in the order of their ids: losses and
/// correct as CrossEntropy has them, the same bits on every part, and the gradient of this part's
/// logits. Reads and writes T·V.
struct CrossEntropyFinish {
  int64_t num_tokens;                 // T
  int64_t vocab;                      // V of this part
  int64_t vocab_begin;                // its first id
  int64_t total_vocab;                // of all parts
  DType dtype;                        // of logits
  void* logits;                       // [T, V] contiguous, as in phase 1
  const int32_t* labels;              // [T]
  int32_t num_parts;                  // P
  const VocabStatistics* statistics;  // [P, T]
  const float* scale;                 // [1] on the kernel's device; read when write_gradient
  bool write_gradient;                // overwrite the logits
  float* losses;                      // [T], unscaled
  int32_t* correct;                   // [T]
};

DSV3_DECLARE_KERNEL(cross_entropy, CrossEntropy)
DSV3_DECLARE_KERNEL(cross_entropy_statistics, CrossEntropyStatistics)
DSV3_DECLARE_KERNEL(cross_entropy_finish, CrossEntropyFinish)

}  // namespace dsv3::kernels
