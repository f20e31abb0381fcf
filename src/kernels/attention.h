#pragma once

#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace dsv3::kernels {

/// Rows of one attention operand: element (t, h, d) stands at t · token + h · head + d.
struct AttentionStrides {
  int64_t token = 0;
  int64_t head = 0;
};

/// What the forward and the backward share. T = num_sequences · sequence_length tokens end to end.
struct AttentionProblem {
  int64_t num_sequences;    // B
  int64_t sequence_length;  // S
  int64_t num_heads;        // H
  int64_t qk_head_dim;      // Dqk
  int64_t v_head_dim;       // Dv
  float scale;              // on q·k before the softmax
  DType dtype;              // of every operand: kF32 or kBF16; sums are in FP32
  const void* q;            // [T, H, Dqk]
  const void* k;            // [T, H, Dqk]
  const void* v;            // [T, H, Dv]
  AttentionStrides q_strides, k_strides, v_strides;
  const int32_t* documents;  // [T], or null: no masking across documents
};

/// out[i] = Σ_{j <= i, same document} softmax_j(scale · q_i·k_j) v_j, sequence by sequence.
/// Tiles of 64 × 64 scores that stay in the cache (Dao 2023, arXiv:2307.08691): memory O(T).
struct AttentionForward {
  AttentionProblem problem;
  void* out;         // [T, H, Dv] contiguous
  float* logsumexp;  // [B, H, S] of the scaled scores, for the backward; may be null
  void* scratch;     // attention_scratch() bytes
};

/// Gradients of the forward; the probabilities are made again from logsumexp, tile by tile.
struct AttentionBackward {
  AttentionProblem problem;
  const void* out;         // [T, H, Dv] contiguous, from the forward
  const void* grad_out;    // [T, H, Dv] contiguous
  const float* logsumexp;  // [B, H, S]
  void* grad_q;            // [T, H, Dqk] contiguous
  void* grad_k;            // [T, H, Dqk] contiguous
  void* grad_v;            // [T, H, Dv] contiguous
  void* scratch;           // attention_scratch() bytes
};

/// Bytes of scratch, enough for the forward and for the backward, with the process's present number
/// of threads.
int64_t attention_scratch(const AttentionProblem& problem);

/// One of the host's bodies: compiled for an instruction set, computing in a dtype.
struct AttentionBody {
  const char* name;  // "avx512_bf16", "avx512", "avx2", "baseline"
  DType dtype;
  void (*forward)(const AttentionForward&);
  void (*backward)(const AttentionBackward&);
  int64_t (*scratch)(const AttentionProblem&);  // bytes that suffice for both
};

/// Those that this machine can run; the first of a dtype is the one that is used.
const std::vector<AttentionBody>& attention_bodies();

// On CUDA attention is cuDNN's, through LibTorch (ops/attention.cpp); these are the host's bodies.
namespace cpu {

/// Throws std::invalid_argument on another dtype. The same bits whatever the number of threads.
void attention_forward(const AttentionForward& p);
void attention_backward(const AttentionBackward& p);

}  // namespace cpu
}  // namespace dsv3::kernels
