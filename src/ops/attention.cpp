#include "ops/attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <atomic>

#include "base/error.h"
#include "kernels/attention.h"
#include "ops/attention_cuda.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/range.h"

namespace dsv3::ops {
namespace {

constexpr const char* kName = "attention";

enum class Body { kHost, kCudnn, kEfficient, kReference };

std::atomic<int64_t> g_calls{0}, g_fallbacks{0};

void check(const AttentionInputs& in, const AttentionOptions& options) {
  require(in.q.defined() && in.q.dim() == 3, "[attention] q: expected [T, H, Dqk]");
  require(in.v.defined() && in.v.dim() == 3, "[attention] v: expected [T, H, Dv]");
  const int64_t tokens = in.q.size(0), heads = in.q.size(1);
  check_shape(in.k, kName, "k", {tokens, heads, in.q.size(2)});
  check_shape(in.v, kName, "v", {tokens, heads, -1});
  check_like(in.k, kName, "k", in.q, "q");
  check_like(in.v, kName, "v", in.q, "q");
  require(options.num_sequences > 0 && tokens % options.num_sequences == 0,
          "[attention] {} tokens are not {} sequences of one length", tokens,
          options.num_sequences);
  require(options.scale > 0.0, "[attention] scale: expected > 0, got {}", options.scale);
  if (options.documents.defined()) {
    check_int32(options.documents, kName, "documents", in.q);
    check_shape(options.documents, kName, "documents", {tokens});
    require(options.documents.is_contiguous(),
            "[attention] documents: expected a contiguous tensor");
  }
}

Body choose(const AttentionInputs& in, const AttentionOptions& options) {
  if (!has_kernel(in.q)) return Body::kReference;
  if (!in.q.is_cuda()) return Body::kHost;
  if (cuda_attention::cudnn_takes(in, options)) return Body::kCudnn;
  return cuda_attention::efficient_takes(in) ? Body::kEfficient : Body::kReference;
}

AttentionInputs with_contiguous_rows(const AttentionInputs& in) {
  return {rows_contiguous(in.q), rows_contiguous(in.k), rows_contiguous(in.v)};
}

kernels::AttentionProblem problem_of(const AttentionInputs& in, const AttentionOptions& options) {
  const auto strides = [](const at::Tensor& x) {
    return kernels::AttentionStrides{.token = x.stride(0), .head = x.stride(1)};
  };
  const at::Tensor& documents = options.documents;
  return {.num_sequences = options.num_sequences,
          .sequence_length = in.q.size(0) / options.num_sequences,
          .num_heads = in.q.size(1),
          .qk_head_dim = in.q.size(2),
          .v_head_dim = in.v.size(2),
          .scale = static_cast<float>(options.scale),
          .dtype = dtype_of(in.q, kName, "q"),
          .q = in.q.const_data_ptr(),
          .k = in.k.const_data_ptr(),
          .v = in.v.const_data_ptr(),
          .q_strides = strides(in.q),
          .k_strides = strides(in.k),
          .v_strides = strides(in.v),
          .documents = documents.defined() ? documents.const_data_ptr<int32_t>() : nullptr};
}

at::Tensor scratch_of(int64_t bytes) {
  return at::empty({bytes}, at::TensorOptions(at::kByte));
}

AttentionResult host_forward(const AttentionInputs& in, const AttentionOptions& options,
                             bool save) {
  const auto problem = problem_of(in, options);
  AttentionResult result;
  result.out = at::empty({in.q.size(0), in.q.size(1), in.v.size(2)}, in.q.options());
  if (save) {
    result.logsumexp =
        at::empty({problem.num_sequences, problem.num_heads, problem.sequence_length},
                  in.q.options().dtype(at::kFloat));
  }
  const at::Tensor scratch = scratch_of(kernels::attention_scratch(problem));
  kernels::cpu::attention_forward(
      {.problem = problem,
       .out = result.out.mutable_data_ptr(),
       .logsumexp = save ? result.logsumexp.mutable_data_ptr<float>() : nullptr,
       .scratch = scratch.mutable_data_ptr()});
  return result;
}

Tensors host_backward(const AttentionInputs& in, const AttentionOptions& options,
                      const AttentionResult& saved, const at::Tensor& grad_out) {
  const auto problem = problem_of(in, options);
  const auto contiguous = at::MemoryFormat::Contiguous;
  Tensors grads{at::empty_like(in.q, contiguous), at::empty_like(in.k, contiguous),
                at::empty_like(in.v, contiguous)};
  const at::Tensor scratch = scratch_of(kernels::attention_scratch(problem));
  kernels::cpu::attention_backward({.problem = problem,
                                    .out = saved.out.const_data_ptr(),
                                    .grad_out = grad_out.const_data_ptr(),
                                    .logsumexp = saved.logsumexp.const_data_ptr<float>(),
                                    .grad_q = grads[0].mutable_data_ptr(),
                                    .grad_k = grads[1].mutable_data_ptr(),
                                    .grad_v = grads[2].mutable_data_ptr(),
                                    .scratch = scratch.mutable_data_ptr()});
  return grads;
}

AttentionResult run_forward(Body body, const AttentionInputs& in, const AttentionOptions& options,
                            bool save) {
  if (body == Body::kCudnn) return cuda_attention::cudnn_forward(in, options, save);
  if (body == Body::kEfficient) return cuda_attention::efficient_forward(in, options, save);
  return host_forward(in, options, save);
}

Tensors run_backward(Body body, const AttentionInputs& in, const AttentionOptions& options,
                     const AttentionResult& saved, const at::Tensor& grad_out) {
  if (grad_out.numel() == 0) {
    return {at::zeros_like(in.q), at::zeros_like(in.k), at::zeros_like(in.v)};
  }
  if (body == Body::kCudnn) return cuda_attention::cudnn_backward(in, options, saved, grad_out);
  if (body == Body::kEfficient) {
    return cuda_attention::efficient_backward(in, options, saved, grad_out);
  }
  return host_backward(in, options, saved, grad_out);
}

}  // namespace

at::Tensor attention(const AttentionInputs& inputs, const AttentionOptions& options) {
  const Range range("attention");
  check(inputs, options);
  const Body body = choose(inputs, options);
  g_calls.fetch_add(1, std::memory_order_relaxed);
  if (body != Body::kHost && body != Body::kCudnn)
    g_fallbacks.fetch_add(1, std::memory_order_relaxed);
  if (body == Body::kReference) return reference::attention(inputs, options);
  const bool recorded = recording({inputs.q, inputs.k, inputs.v});
  AttentionResult result;
  AttentionInputs in;
  {
    const NoRecord guard;
    in = with_contiguous_rows({inputs.q.detach(), inputs.k.detach(), inputs.v.detach()});
    if (in.q.numel() == 0 || in.v.numel() == 0) {
      result.out = at::empty({in.q.size(0), in.q.size(1), in.v.size(2)}, in.q.options()).zero_();
    } else {
      result = run_forward(body, in, options, recorded);
    }
  }
  if (!recorded) return result.out;
  AttentionResult saved = result;
  saved.out = result.out.detach();
  AttentionInputs kept = options.remake ? AttentionInputs() : in;
  record(kName, {inputs.q, inputs.k, inputs.v}, {result.out},
         [body, options, saved, kept](const Tensors& grads) -> Tensors {
           if (!grads[0].defined()) return Tensors(3);
           const auto again = options.remake ? with_contiguous_rows(options.remake()) : kept;
           return run_backward(body, again, options, saved, grads[0].contiguous());
         });
  return result.out;
}

AttentionCalls attention_calls() {
  return {g_calls.load(std::memory_order_relaxed), g_fallbacks.load(std::memory_order_relaxed)};
}

}  // namespace dsv3::ops
