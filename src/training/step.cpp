#include "training/step.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
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
                              const GradientOptions& options, PhaseTimer* timer) {
  const auto begin = [timer](Phase phase) {
    if (timer != nullptr) timer->begin(phase);
  };
  begin(Phase::kForward);
  const LossScales scales = make_scales(batch, options);
  StepSums sums;
  for (size_t i = 0; i < batch.micro_batches.size(); ++i) {
    const ops::Range range("micro-batch", static_cast<int64_t>(i));
    const TokenBatch tokens =
        to_device(batch.micro_batches[i], options.device, options.mask_documents);
    LossOutput output;
    begin(Phase::kForward);
    {
      const ops::Range forward("forward");
      output = model.loss(tokens, scales, options.recompute);
    }
    {
      const ops::Range backward("backward");
      begin(Phase::kBackward);
      output.objective.backward();
    }
    const ops::NoRecord guard;
    const at::Tensor scalars = scalars_of(output);
    sums.scalars = sums.scalars.defined() ? sums.scalars + scalars : scalars;
    if (output.expert_counts.defined()) ops::add_load(sums.load, output.expert_counts);
  }
  return sums;
}

PendingNumbers::PendingNumbers(const StepSums& sums, const GradientNorm& norm,
                               const GlobalBatch& batch, StepReport report)
    : timer_(std::move(report.timer)),
      valid_(batch.valid),
      sequences_(batch.sequences),
      mtp_valid_(batch.mtp_valid) {
  const ops::NoRecord guard;
  std::vector<at::Tensor> parts{
      sums.scalars, norm.norm.to(at::kDouble).reshape({1}), norm.skip.to(at::kDouble).reshape({1}),
      norm.moved.defined() ? norm.moved : at::zeros({2}, sums.scalars.options())};
  if (sums.load.tokens.defined()) {
    moe_layers_ = sums.load.tokens.size(0);
    num_experts_ = sums.load.tokens.size(1);
    with_loads_ = report.with_loads;
    report.biases.resize(static_cast<size_t>(moe_layers_));
    parts.push_back(ops::load_statistics(sums.load, report.biases).view({-1}));
    if (with_loads_) parts.push_back(sums.load.tokens.to(at::kDouble).view({-1}));
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
  const auto* next = host_.data_ptr<double>();
  const auto take = [&next] { return *next++; };
  StepNumbers numbers;
  numbers.loss = take() * one_over(valid_);
  numbers.accuracy = take() * one_over(valid_);
  const double balance = take();
  for (const int64_t valid : mtp_valid_) {
    numbers.mtp_losses.push_back(take() * one_over(valid));
    numbers.mtp_acceptances.push_back(take() * one_over(valid));
  }
  numbers.grad_norm = take();
  numbers.skip = static_cast<int>(take());
  const double update = take(), weight = take();
  numbers.update_to_weight = weight > 0 ? std::sqrt(update / weight) : kNan;
  numbers.balance_loss = moe_layers_ > 0 ? balance * one_over(sequences_ * moe_layers_) : kNan;
  numbers.layers.resize(static_cast<size_t>(moe_layers_));
  for (auto& layer : numbers.layers)
    for (double& value : layer) value = take();
  if (with_loads_) {
    numbers.loads.resize(static_cast<size_t>(moe_layers_));
    for (auto& loads : numbers.loads)
      for (int64_t expert = 0; expert < num_experts_; ++expert)
        loads.push_back(static_cast<int64_t>(take()));
  }
  if (timer_) numbers.seconds = timer_->seconds();
  return numbers;
}

}  // namespace dsv3
