#include "ops/split_cross_entropy.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "base/error.h"
#include "kernels/loss.h"
#include "ops/autograd.h"
#include "ops/cross_entropy.h"
#include "ops/dispatch.h"

namespace dsv3::ops {
namespace {

static_assert(sizeof(kernels::VocabStatistics) == 4 * sizeof(float));

void check_part(const char* op, const at::Tensor& logits, const at::Tensor& labels,
                const VocabPart& part) {
  check_shape(logits, op, "logits", {-1, -1});
  check_number(logits, op, "logits");
  require(logits.is_contiguous(), "[{}] logits: expected a contiguous tensor", op);
  check_shape(labels, op, "labels", {logits.size(0)});
  check_int32(labels, op, "labels", logits);
  require(part.begin >= 0 && part.begin + logits.size(1) <= part.total,
          "[{}] part: ids {} to {} are not within the vocabulary of {}", op, part.begin,
          part.begin + logits.size(1) - 1, part.total);
}

/// Where labels [T] are ids of this part, and their place in it (0 elsewhere), [T, 1].
struct LocalLabels {
  at::Tensor ours, ids;
};
LocalLabels local_labels(const at::Tensor& labels, const at::Tensor& logits,
                         const VocabPart& part) {
  const at::Tensor local = labels.to(at::kLong).sub(part.begin);
  const at::Tensor ours =
      labels.ge(0).logical_and(local.ge(0)).logical_and(local.lt(logits.size(1)));
  return {ours, local.clamp(0, std::max<int64_t>(0, logits.size(1) - 1)).unsqueeze(1)};
}

at::Tensor reference_statistics(const at::Tensor& logits, const at::Tensor& labels,
                                const VocabPart& part) {
  const at::Tensor none = at::full({logits.size(0)}, -std::numeric_limits<double>::infinity(),
                                   logits.options().requires_grad(false));
  if (logits.size(1) == 0) {
    return at::stack({none, at::zeros_like(none), none, at::full_like(none, -1.0)}, 1);
  }
  const at::Tensor largest = logits.amax(1);
  const at::Tensor sum = logits.sub(largest.unsqueeze(1)).exp().sum(1);
  const auto [ours, ids] = local_labels(labels, logits, part);
  const at::Tensor label_logit = at::where(ours, logits.gather(1, ids).squeeze(1), none);
  const at::Tensor argmax = logits.argmax(1).add(part.begin).to(logits.scalar_type());
  return at::stack({largest, sum, label_logit, argmax}, 1);
}

TokenLosses reference_finish(const at::Tensor& logits, const at::Tensor& labels,
                             const VocabPart& part, const at::Tensor& statistics,
                             const at::Tensor& scale, bool write_gradient) {
  const at::Tensor largest = statistics.select(2, 0), all = largest.amax(0);
  const at::Tensor sum = largest.sub(all).exp().mul(statistics.select(2, 1)).sum(0);
  const at::Tensor valid = labels.ge(0);
  const at::Tensor losses = sum.log().add(all).sub(statistics.select(2, 2).amax(0));
  const at::Tensor best = statistics.select(2, 3).gather(0, largest.argmax(0, true)).squeeze(0);
  if (write_gradient && logits.size(1) > 0) {
    const auto [ours, ids] = local_labels(labels, logits, part);
    at::Tensor gradient = logits.sub(all.unsqueeze(1)).exp().div(sum.unsqueeze(1));
    gradient.scatter_add_(1, ids, ours.to(logits.scalar_type()).neg().unsqueeze(1));
    logits.copy_(gradient.mul(valid.unsqueeze(1)).mul(scale));
  }
  return {at::where(valid, losses, at::zeros_like(losses)),
          best.eq(labels).logical_and(valid).to(at::kInt)};
}

}  // namespace

at::Tensor vocab_statistics(const at::Tensor& logits, const at::Tensor& labels,
                            const VocabPart& part) {
  constexpr const char* kOp = "vocab_statistics";
  check_part(kOp, logits, labels, part);
  const NoRecord guard;
  if (!has_kernel(logits)) return reference_statistics(logits, labels, part);
  const at::Tensor result =
      at::empty({logits.size(0), 4}, logits.options().dtype(at::kFloat).requires_grad(false));
  const at::Tensor ids = labels.contiguous();
  kernels::cross_entropy_statistics(
      {.num_tokens = logits.size(0),
       .vocab = logits.size(1),
       .vocab_begin = part.begin,
       .total_vocab = part.total,
       .dtype = dtype_of(logits, kOp, "logits"),
       .logits = logits.const_data_ptr(),
       .labels = ids.const_data_ptr<int32_t>(),
       .statistics = static_cast<kernels::VocabStatistics*>(result.mutable_data_ptr())},
      stream_of(logits));
  return result;
}

TokenLosses finish_cross_entropy_(const at::Tensor& logits, const at::Tensor& labels,
                                  const VocabPart& part, const at::Tensor& statistics,
                                  const at::Tensor& scale, bool write_gradient) {
  constexpr const char* kOp = "finish_cross_entropy";
  check_part(kOp, logits, labels, part);
  check_shape(statistics, kOp, "statistics", {-1, logits.size(0), 4});
  require(statistics.size(0) >= 1, "[{}] statistics: expected those of at least one part", kOp);
  const auto number = has_kernel(logits) ? at::kFloat : at::kDouble;
  for (const auto& [tensor, name] : {std::pair(statistics, "statistics"), {scale, "scale"}}) {
    require(
        tensor.defined() && tensor.scalar_type() == number && tensor.device() == logits.device(),
        "[{}] {}: expected {} on {}", kOp, name, c10::toString(number), logits.device().str());
  }
  require(scale.numel() == 1, "[{}] scale: expected one number, got {}", kOp, scale.numel());
  const NoRecord guard;
  if (!has_kernel(logits)) {
    return reference_finish(logits, labels, part, statistics, scale, write_gradient);
  }
  const auto options = logits.options().requires_grad(false);
  TokenLosses result{at::empty({logits.size(0)}, options.dtype(at::kFloat)),
                     at::empty({logits.size(0)}, options.dtype(at::kInt))};
  const at::Tensor ids = labels.contiguous(), all = statistics.contiguous();
  kernels::cross_entropy_finish(
      {.num_tokens = logits.size(0),
       .vocab = logits.size(1),
       .vocab_begin = part.begin,
       .total_vocab = part.total,
       .dtype = dtype_of(logits, kOp, "logits"),
       .logits = logits.mutable_data_ptr(),
       .labels = ids.const_data_ptr<int32_t>(),
       .num_parts = static_cast<int32_t>(all.size(0)),
       .statistics = static_cast<const kernels::VocabStatistics*>(all.const_data_ptr()),
       .scale = scale.const_data_ptr<float>(),
       .write_gradient = write_gradient,
       .losses = result.losses.mutable_data_ptr<float>(),
       .correct = result.correct.mutable_data_ptr<int32_t>()},
      stream_of(logits));
  return result;
}

}  // namespace dsv3::ops
