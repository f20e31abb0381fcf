#include "ops/cross_entropy.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "base/error.h"
#include "kernels/loss.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"
#include "ops/range.h"
#include "ops/weight_grad.h"

namespace dsv3::ops {
namespace {

static_assert(kIgnoreLabel == kernels::kIgnoredLabel);

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

void check_scale(const char* op, const at::Tensor& scale, const at::Tensor& like) {
  require(scale.defined() && scale.numel() == 1 && scale.device() == like.device() &&
              scale.scalar_type() == (has_kernel(like) ? at::kFloat : at::kDouble),
          "[{}] scale: expected one Float (Double with Double inputs) on {}", op,
          like.device().str());
}

void check_head(const at::Tensor& hidden, const Weight& weight, const at::Tensor& labels,
                const at::Tensor& scale) {
  constexpr const char* kOp = "head_cross_entropy";
  check_shape(hidden, kOp, "hidden", {-1, -1});
  check_number(hidden, kOp, "hidden");
  check_shape(weight.value, kOp, "weight", {-1, hidden.size(1)});
  check_like(weight.value, kOp, "weight", hidden, "hidden");
  check_shape(labels, kOp, "labels", {hidden.size(0)});
  check_int32(labels, kOp, "labels", hidden);
  check_scale(kOp, scale, hidden);
}

/// The kernel's work for float64: fills losses and correct, overwrites the logits by their
/// gradient.
void reference_chunk(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& scale,
                     bool write_gradient, const at::Tensor& losses, const at::Tensor& correct) {
  const at::Tensor valid = labels.ge(0);
  losses.copy_(reference::cross_entropy(logits, labels));
  correct.copy_(logits.argmax(1).eq(labels).logical_and(valid));
  if (!write_gradient) return;
  at::Tensor gradient = at::log_softmax(logits, 1).exp_();
  const at::Tensor ids = labels.clamp_min(0).to(at::kLong).unsqueeze(1);
  gradient.scatter_(1, ids, gradient.gather(1, ids).sub(1.0));
  logits.copy_(gradient.mul_(valid.unsqueeze(1)).mul_(scale));
}

/// One chunk of tokens: losses and correct of its tokens, logits overwritten by their gradient.
void score_chunk(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& scale,
                 bool write_gradient, const at::Tensor& losses, const at::Tensor& correct) {
  if (!has_kernel(logits)) {
    reference_chunk(logits, labels, scale, write_gradient, losses, correct);
    return;
  }
  kernels::cross_entropy({.num_tokens = logits.size(0),
                          .vocab = logits.size(1),
                          .dtype = dtype_of(logits, "head_cross_entropy", "hidden"),
                          .logits = logits.mutable_data_ptr(),
                          .labels = labels.const_data_ptr<int32_t>(),
                          .scale = scale.const_data_ptr<float>(),
                          .write_gradient = write_gradient,
                          .losses = losses.mutable_data_ptr<float>(),
                          .correct = correct.mutable_data_ptr<int32_t>()},
                         stream_of(logits));
}

HeadLoss loss_of(const at::Tensor& losses, const at::Tensor& correct, const at::Tensor& scale) {
  const at::Tensor loss_sum = losses.sum();
  return {loss_sum.mul(scale.reshape(c10::IntArrayRef{})), loss_sum, correct.sum()};
}

struct Gradients {
  bool hidden = false;  // wanted at all?
  bool weight = false;
  at::Tensor dhidden;  // [T, D]
};

/// The whole loss without autograd; fills `gradients.dhidden` and adds the weight's gradient where
/// wanted.
HeadLoss score(const at::Tensor& hidden, const Weight& weight, const at::Tensor& labels,
               const at::Tensor& scale, Gradients& gradients) {
  const int64_t num_tokens = hidden.size(0), vocab = weight.value.size(0);
  const bool write_gradient = gradients.hidden || gradients.weight;
  const auto float_type = has_kernel(hidden) ? at::kFloat : at::kDouble;
  at::Tensor losses = at::empty({num_tokens}, hidden.options().dtype(float_type));
  at::Tensor correct = at::empty({num_tokens}, labels.options());
  if (gradients.hidden) gradients.dhidden = at::empty_like(hidden);
  const int64_t chunk =
      head_chunk_tokens(num_tokens, vocab, hidden.element_size(), hidden.is_cuda());
  const at::Tensor buffer = at::empty({std::min(chunk, num_tokens), vocab}, hidden.options());
  for (int64_t begin = 0; begin < num_tokens; begin += chunk) {
    const int64_t size = std::min(chunk, num_tokens - begin);
    const at::Tensor x = hidden.narrow(0, begin, size);
    at::Tensor logits = buffer.narrow(0, 0, size);
    at::mm_out(logits, x, weight.value.t());
    score_chunk(logits, labels.narrow(0, begin, size), scale, write_gradient,
                losses.narrow(0, begin, size), correct.narrow(0, begin, size));
    if (gradients.hidden) {
      at::Tensor dx = gradients.dhidden.narrow(0, begin, size);
      at::mm_out(dx, logits, weight.value);
    }
    if (gradients.weight) add_weight_grad(logits, x, weight.grad);
  }
  return loss_of(losses, correct, scale);
}

}  // namespace

int64_t head_chunk_tokens(int64_t num_tokens, int64_t vocab, int64_t element_size, bool cuda) {
  constexpr int64_t kMebi = int64_t{1} << 20;
  const int64_t budget = cuda ? 1024 * kMebi : 4 * kMebi;
  const int64_t multiple = cuda ? 128 : 16;
  const int64_t least = cuda ? 128 : 512;
  const int64_t most =
      std::max(least, budget / std::max<int64_t>(1, vocab * element_size) / multiple * multiple);
  if (num_tokens <= most) return std::max<int64_t>(1, num_tokens);
  // Equal chunks: a short last one would waste its products.
  const int64_t num_chunks = (num_tokens + most - 1) / most;
  return std::min(most, round_up((num_tokens + num_chunks - 1) / num_chunks, multiple));
}

HeadLoss head_cross_entropy(const at::Tensor& hidden, const Weight& weight,
                            const at::Tensor& labels, const at::Tensor& scale) {
  const Range range("head_cross_entropy");
  check_head(hidden, weight, labels, scale);
  const bool recorded = recording({hidden, weight.value});
  Gradients gradients;
  gradients.hidden = recorded && hidden.requires_grad();
  gradients.weight = recorded && weight.value.requires_grad() && weight.grad.defined();
  HeadLoss result;
  {
    const NoRecord guard;
    result = score(hidden.contiguous(), weight, labels.contiguous(), scale, gradients);
  }
  if (!recorded) return result;
  record("head_cross_entropy", {hidden, weight.value}, {result.objective},
         [dhidden = gradients.dhidden](const Tensors& grads) -> Tensors {
           if (!grads[0].defined() || !dhidden.defined()) return {at::Tensor(), at::Tensor()};
           return {dhidden.mul_(grads[0]), at::Tensor()};
         });
  return result;
}

HeadLoss cross_entropy_(const at::Tensor& logits, const at::Tensor& labels,
                        const at::Tensor& scale) {
  constexpr const char* kOp = "cross_entropy";
  check_shape(logits, kOp, "logits", {-1, -1});
  check_number(logits, kOp, "logits");
  require(logits.is_contiguous(), "[{}] logits: expected a contiguous tensor", kOp);
  check_shape(labels, kOp, "labels", {logits.size(0)});
  check_int32(labels, kOp, "labels", logits);
  check_scale(kOp, scale, logits);
  const bool recorded = recording({logits});
  HeadLoss result;
  at::Tensor gradient;
  {
    const NoRecord guard;
    gradient = logits.detach();
    const auto type = has_kernel(logits) ? at::kFloat : at::kDouble;
    const at::Tensor losses = at::empty({logits.size(0)}, gradient.options().dtype(type));
    const at::Tensor correct = at::empty({logits.size(0)}, labels.options());
    score_chunk(gradient, labels.contiguous(), scale, recorded, losses, correct);
    result = loss_of(losses, correct, scale);
  }
  if (!recorded) return result;
  record(kOp, {logits}, {result.objective}, [gradient](const Tensors& grads) -> Tensors {
    if (!grads[0].defined()) return {at::Tensor()};
    return {gradient.mul_(grads[0])};
  });
  return result;
}

namespace reference {

at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& labels) {
  if (labels.is_cpu()) {
    const at::Tensor good =
        labels.ge(0).logical_and(labels.lt(logits.size(1))).logical_or(labels.eq(kIgnoreLabel));
    require(good.all().item<bool>(), "[cross_entropy] labels: expected 0 to {} or {} (ignored)",
            logits.size(1) - 1, kIgnoreLabel);
  }
  const at::Tensor ids = labels.clamp_min(0).to(at::kLong).unsqueeze(1);
  const at::Tensor losses = at::log_softmax(logits, 1).gather(1, ids).squeeze(1).neg();
  return at::where(labels.ne(kIgnoreLabel), losses, at::zeros_like(losses));
}

}  // namespace reference

}  // namespace dsv3::ops
