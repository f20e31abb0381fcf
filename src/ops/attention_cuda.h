#pragma once

#include <ATen/core/Tensor.h>

#include "ops/attention.h"
#include "ops/autograd.h"

namespace dsv3::ops {

/// What a forward leaves for its backward.
struct AttentionResult {
  at::Tensor out;        // [T, H, Dv] contiguous
  at::Tensor logsumexp;  // the body's own layout
  at::Tensor random[2];  // seed and offset of LibTorch's dropout: asked for even without dropout
};

/// LibTorch's attention on CUDA. Rows of the inputs are contiguous; gradients come as dq, dk, dv in
/// any strides.
namespace cuda_attention {

/// cuDNN: BF16, whole sequences, heads up to 256 in multiples of 8 (192/128 as they are).
bool cudnn_takes(const AttentionInputs& in, const AttentionOptions& options);
AttentionResult cudnn_forward(const AttentionInputs& in, const AttentionOptions& options,
                              bool save);
Tensors cudnn_backward(const AttentionInputs& in, const AttentionOptions& options,
                       const AttentionResult& saved, const at::Tensor& grad_out);

/// The memory-efficient kernel: FP32, and document masks as a bias [B, 1, S, S]. Slower; heads in
/// multiples of 16 bytes.
bool efficient_takes(const AttentionInputs& in);
AttentionResult efficient_forward(const AttentionInputs& in, const AttentionOptions& options,
                                  bool save);
Tensors efficient_backward(const AttentionInputs& in, const AttentionOptions& options,
                           const AttentionResult& saved, const at::Tensor& grad_out);

}  // namespace cuda_attention

/// [S, S] bool, or [B, 1, S, S] with documents: true where the query (row) must NOT see the key.
at::Tensor attention_mask(const AttentionOptions& options, int64_t sequence_length,
                          at::Device device);

}  // namespace dsv3::ops
