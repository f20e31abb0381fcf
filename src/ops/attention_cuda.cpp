#include "ops/attention_cuda.h"

#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention_backward.h>
#include <ATen/ops/zeros.h>

namespace dsv3::ops::cuda_attention {
namespace {

/// [T, H, D] → [B, H, S, D], a view.
at::Tensor by_head(const at::Tensor& x, const AttentionOptions& options) {
  const int64_t b = options.num_sequences;
  return x.unflatten(0, {b, x.size(0) / b}).transpose(1, 2);
}

/// [B, H, S, D] → [T, H, D]; a view where the memory lies so, as LibTorch's outputs do.
at::Tensor by_token(const at::Tensor& x) {
  return x.transpose(1, 2).flatten(0, 1);
}

bool multiple(const AttentionInputs& in, int64_t of) {
  return in.q.size(2) % of == 0 && in.v.size(2) % of == 0;
}

/// Rows as the kernels load them: 16 bytes at a time.
bool aligned(const at::Tensor& x) {
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
         x.stride(0) * bytes % 16 == 0 && x.stride(1) * bytes % 16 == 0;
}

at::Tensor loadable(const at::Tensor& x) {
  return aligned(x) ? x : x.contiguous();
}

AttentionInputs operands(const AttentionInputs& in, const AttentionOptions& options) {
  return {by_head(loadable(in.q), options), by_head(loadable(in.k), options),
          by_head(loadable(in.v), options)};
}

/// Causal order and documents as an additive bias [B, H, S, S] (heads share it); undefined without
/// documents.
at::Tensor bias_of(const at::Tensor& q, const AttentionOptions& options) {
  if (!options.documents.defined()) return {};
  constexpr int64_t kRowMultiple = 16;  // the kernel wants the bias's rows 16-byte aligned
  constexpr double kExcluded = -1e9;    // finite: a block without any allowed key makes no NaN
  const int64_t b = options.num_sequences, s = q.size(2);
  const int64_t width = (s + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
  at::Tensor bias = at::zeros({b, 1, s, width}, q.options()).narrow(3, 0, s);
  bias.masked_fill_(attention_mask(options, s, q.device()), kExcluded);
  return bias.expand({b, q.size(1), s, s});
}

}  // namespace

bool cudnn_takes(const AttentionInputs& in, const AttentionOptions& options) {
  constexpr int64_t kLargestHead = 256;
  return in.q.scalar_type() == at::kBFloat16 && !options.documents.defined() && multiple(in, 8) &&
         in.q.size(2) <= kLargestHead && in.v.size(2) <= kLargestHead &&
         in.q.size(0) > options.num_sequences;  // it refuses sequences of one token
}

AttentionResult cudnn_forward(const AttentionInputs& in, const AttentionOptions& options,
                              bool save) {
  const auto x = operands(in, options);
  auto [out, logsumexp, ends_q, ends_k, max_q, max_k, seed, offset, debug] =
      at::_scaled_dot_product_cudnn_attention(x.q, x.k, x.v, std::nullopt, save, 0.0, true, false,
                                              options.scale);
  return {by_token(out).contiguous(), logsumexp, {seed, offset}};
}

Tensors cudnn_backward(const AttentionInputs& in, const AttentionOptions& options,
                       const AttentionResult& saved, const at::Tensor& grad_out) {
  const auto x = operands(in, options);
  const int64_t s = x.q.size(2);
  // No bias and no ragged sequences: those arguments are undefined tensors.
  auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
      by_head(grad_out, options), x.q, x.k, x.v, by_head(saved.out, options), saved.logsumexp,
      saved.random[0], saved.random[1], at::Tensor(), at::Tensor(), at::Tensor(), s, s, 0.0, true,
      options.scale);
  return {by_token(dq), by_token(dk), by_token(dv)};
}

bool efficient_takes(const AttentionInputs& in) {
  return multiple(in, 16 / static_cast<int64_t>(in.q.element_size()));
}

AttentionResult efficient_forward(const AttentionInputs& in, const AttentionOptions& options,
                                  bool save) {
  const auto x = operands(in, options);
  const at::Tensor bias = bias_of(x.q, options);
  auto [out, logsumexp, seed, offset] = at::_scaled_dot_product_efficient_attention(
      x.q, x.k, x.v, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt, save, 0.0,
      !bias.defined(), options.scale);
  return {by_token(out).contiguous(), logsumexp, {seed, offset}};
}

Tensors efficient_backward(const AttentionInputs& in, const AttentionOptions& options,
                           const AttentionResult& saved, const at::Tensor& grad_out) {
  const auto x = operands(in, options);
  const at::Tensor bias = bias_of(x.q, options);
  auto [dq, dk, dv, dbias] = at::_scaled_dot_product_efficient_attention_backward(
      by_head(grad_out, options), x.q, x.k, x.v, bias, by_head(saved.out, options), saved.logsumexp,
      saved.random[0], saved.random[1], 0.0, {true, true, true, false}, !bias.defined(),
      options.scale);
  return {by_token(dq), by_token(dk), by_token(dv)};
}

}  // namespace dsv3::ops::cuda_attention
