#include "training/step.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/std.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cmath>
#include <limits>

#include "ops/autograd.h"
#include "ops/range.h"

namespace dsv3 {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

at::Tensor scalar_on(const at::Device& device, double value) {
  return at::full({}, value, at::TensorOptions(at::kFloat).device(device));
}

LossScales make_scales(const GlobalBatch& batch, const GradientOptions& options) {
  LossScales scales;
  scales.main = scalar_on(options.device, one_over(batch.valid));
  const auto depths = static_cast<double>(batch.mtp_valid.size());
  for (const int64_t valid : batch.mtp_valid)
    scales.mtp.push_back(scalar_on(options.device, options.mtp_weight / depths * one_over(valid)));
  if (options.balance_alpha > 0)
    scales.balance = scalar_on(options.device, options.balance_alpha * one_over(batch.sequences));
  return scales;
}

at::Tensor scalars_of(const LossOutput& output) {
  std::vector<at::Tensor> parts{output.loss_sum, output.correct};
  parts.push_back(output.balance_sum.defined() ? output.balance_sum
                                               : at::zeros({}, output.loss_sum.options()));
  for (size_t depth = 0; depth < output.mtp_loss_sums.size(); ++depth) {
    parts.push_back(output.mtp_loss_sums[depth]);
    parts.push_back(output.mtp_correct[depth]);
  }
  for (auto& part : parts) part = part.to(at::kDouble).reshape({});
  return at::stack(parts);
}

}  // namespace

double one_over(int64_t count) {
  return count > 0 ? 1.0 / static_cast<double>(count) : 0.0;
}

StepSums accumulate_gradients(const Model& model, const GlobalBatch& batch,
                              const GradientOptions& options) {
  const LossScales scales = make_scales(batch, options);
  StepSums sums;
  for (size_t i = 0; i < batch.micro_batches.size(); ++i) {
    const ops::Range range("micro-batch", static_cast<int64_t>(i));
    const TokenBatch tokens =
        to_device(batch.micro_batches[i], options.device, options.mask_documents);
    LossOutput output;
    {
      const ops::Range forward("forward");
      output = model.loss(tokens, scales, options.recompute);
    }
    {
      const ops::Range backward("backward");
      output.objective.backward();
    }
    const ops::NoRecord guard;
    const at::Tensor scalars = scalars_of(output);
    sums.scalars = sums.scalars.defined() ? sums.scalars + scalars : scalars;
    if (!output.expert_counts.defined()) continue;
    const at::Tensor counts = output.expert_counts.to(at::kLong);
    sums.loads = sums.loads.defined() ? sums.loads + counts : counts;
  }
  return sums;
}

PendingNumbers::PendingNumbers(const StepSums& sums, const GradientNorm& norm,
                               const GlobalBatch& batch)
    : valid_(batch.valid), sequences_(batch.sequences), mtp_valid_(batch.mtp_valid) {
  const ops::NoRecord guard;
  std::vector<at::Tensor> parts{sums.scalars, norm.norm.to(at::kDouble).reshape({1}),
                                norm.skip.to(at::kDouble).reshape({1})};
  if (sums.loads.defined()) {
    moe_layers_ = sums.loads.size(0);
    const at::Tensor loads = sums.loads.to(at::kDouble);
    const at::Tensor mean = loads.mean(1);
    const at::Tensor safe = mean.clamp_min(1e-9);
    const at::Tensor violation = (at::amax(loads, 1) - mean) / safe;
    const at::Tensor imbalance = at::std(loads, /*dim=*/1, /*unbiased=*/false) / safe;
    parts.push_back(violation.max().reshape({1}));
    parts.push_back(imbalance.mean().reshape({1}));
  }
  const at::Tensor numbers = at::cat(parts);
  if (!numbers.is_cuda()) {
    host_ = numbers;
    return;
  }
  host_ = at::empty(numbers.sizes(), at::TensorOptions(at::kDouble).pinned_memory(true));
  host_.copy_(numbers, /*non_blocking=*/true);
  copied_.emplace(at::kCUDA);
  copied_->record(c10::impl::VirtualGuardImpl(at::kCUDA).getStream(numbers.device()));
}

StepNumbers PendingNumbers::wait() {
  if (copied_) copied_->synchronize();
  const auto* values = host_.data_ptr<double>();
  const auto depths = static_cast<int64_t>(mtp_valid_.size());
  StepNumbers numbers;
  numbers.loss = values[0] * one_over(valid_);
  numbers.accuracy = values[1] * one_over(valid_);
  numbers.mtp_loss = numbers.mtp_acceptance = kNan;
  if (depths > 0) {
    numbers.mtp_loss = 0;
    for (int64_t depth = 0; depth < depths; ++depth)
      numbers.mtp_loss += values[3 + 2 * depth] * one_over(mtp_valid_[static_cast<size_t>(depth)]) /
                          static_cast<double>(depths);
    numbers.mtp_acceptance = values[4] * one_over(mtp_valid_[0]);
  }
  const auto* rest = values + 3 + 2 * depths;
  numbers.grad_norm = rest[0];
  numbers.skip = static_cast<int>(rest[1]);
  numbers.max_violation = moe_layers_ > 0 ? rest[2] : kNan;
  numbers.load_imbalance = moe_layers_ > 0 ? rest[3] : kNan;
  numbers.balance_loss = moe_layers_ > 0 ? values[2] * one_over(sequences_ * moe_layers_) : kNan;
  return numbers;
}

}  // namespace dsv3
