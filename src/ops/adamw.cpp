#include "ops/adamw.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "base/error.h"
#include "kernels/optimizer.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"

namespace dsv3::ops {
namespace {

constexpr const char* kOp = "adamw";

void check_flat(const at::Tensor& tensor, const char* name, const at::Tensor& weights) {
  check_shape(tensor, kOp, name, {weights.size(0)});
  check_number(tensor, kOp, name);
  require(tensor.is_contiguous() && tensor.device() == weights.device() &&
              has_kernel(tensor) == has_kernel(weights),
          "[{}] {}: expected a contiguous tensor beside weights of {} on {}, got {} on {}", kOp,
          name, c10::toString(weights.scalar_type()), weights.device().str(),
          c10::toString(tensor.scalar_type()), tensor.device().str());
}

/// A number, or a few, that the kernel reads on the device.
void check_numbers(const at::Tensor& tensor, const char* name, int64_t count, at::ScalarType type,
                   const at::Tensor& weights) {
  if (!tensor.defined()) return;
  require(tensor.numel() == count && tensor.scalar_type() == type && tensor.is_contiguous() &&
              tensor.device() == weights.device(),
          "[{}] {}: expected {} of {} on {}, got {} of {} on {}", kOp, name, count,
          c10::toString(type), weights.device().str(), tensor.numel(),
          c10::toString(tensor.scalar_type()), tensor.device().str());
}

void check(const AdamWRange& range, const AdamWStep& step) {
  check_shape(range.weights, kOp, "weights", {-1});
  check_flat(range.weights, "weights", range.weights);
  check_flat(range.gradients, "gradients", range.weights);
  check_flat(range.exp_avg, "exp_avg", range.weights);
  check_flat(range.exp_avg_sq, "exp_avg_sq", range.weights);
  check_like(range.exp_avg_sq, kOp, "exp_avg_sq", range.exp_avg, "exp_avg");
  if (range.ema.defined()) check_flat(range.ema, "ema", range.weights);
  if (range.master.defined()) {
    check_flat(range.master, "master", range.weights);
    require(
        range.master.scalar_type() == at::kFloat && range.weights.scalar_type() == at::kBFloat16,
        "[{}] master: expected Float beside BFloat16 weights, got {} beside {}", kOp,
        c10::toString(range.master.scalar_type()), c10::toString(range.weights.scalar_type()));
  }
  check_numbers(step.corrections, "corrections", 2, at::kFloat, range.weights);
  check_numbers(step.gradient_scale, "gradient_scale", 1, at::kFloat, range.weights);
  check_numbers(step.skip, "skip", 1, at::kInt, range.weights);
  check_numbers(step.moved, "moved", 2 * kernels::adamw_partials(range.weights.size(0)),
                at::kDouble, range.weights);
}

void* address(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}
template <typename T>
const T* address_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

/// The kernel's work for float64.
void copy_reference(const AdamWRange& range, const AdamWStep& step) {
  const AdamWRange after = reference::adamw(range, step);
  range.weights.copy_(after.weights);
  range.gradients.copy_(after.gradients);
  range.exp_avg.copy_(after.exp_avg);
  range.exp_avg_sq.copy_(after.exp_avg_sq);
  if (range.ema.defined()) range.ema.copy_(after.ema);
}

}  // namespace

void adamw_(const AdamWRange& range, const AdamWStep& step) {
  const NoRecord guard;
  check(range, step);
  if (!has_kernel(range.weights)) return copy_reference(range, step);
  kernels::adamw({.size = range.weights.size(0),
                  .weight_dtype = dtype_of(range.weights, kOp, "weights"),
                  .gradient_dtype = dtype_of(range.gradients, kOp, "gradients"),
                  .moment_dtype = dtype_of(range.exp_avg, kOp, "exp_avg"),
                  .weights = address(range.weights),
                  .master = static_cast<float*>(address(range.master)),
                  .gradients = address(range.gradients),
                  .exp_avg = address(range.exp_avg),
                  .exp_avg_sq = address(range.exp_avg_sq),
                  .learning_rate = static_cast<float>(step.learning_rate),
                  .beta1 = step.beta1,
                  .beta2 = step.beta2,
                  .eps = static_cast<float>(step.eps),
                  .weight_decay = static_cast<float>(step.weight_decay),
                  .correction1 = static_cast<float>(step.correction1),
                  .correction2 = static_cast<float>(step.correction2),
                  .gradient_scale = address_of<float>(step.gradient_scale),
                  .skip = address_of<int32_t>(step.skip),
                  .zero_gradients = step.zero_gradients,
                  .corrections = address_of<float>(step.corrections),
                  .decay_end = step.decay_end,
                  .ema = address(range.ema),
                  .ema_dtype = range.ema.defined() ? dtype_of(range.ema, kOp, "ema") : DType::kF32,
                  .ema_decay = step.ema_decay,
                  .stochastic_rounding = step.stochastic_rounding,
                  .seed = step.seed,
                  .step = step.step,
                  .first_index = step.first_index,
                  .partials = static_cast<double*>(address(step.moved))},
                 stream_of(range.weights));
}

namespace reference {

AdamWRange adamw(const AdamWRange& range, const AdamWStep& step) {
  const NoRecord guard;
  const auto wide = [](const at::Tensor& x) { return x.defined() ? x.to(at::kDouble) : x; };
  const auto number = [](const at::Tensor& x, int64_t i) {
    return x.flatten().select(0, i).to(at::kDouble).item<double>();
  };
  const bool skipped = step.skip.defined() && number(step.skip, 0) != 0;
  AdamWRange after{wide(range.weights), wide(range.master),     wide(range.gradients),
                   wide(range.exp_avg), wide(range.exp_avg_sq), wide(range.ema)};
  if (step.zero_gradients) after.gradients = at::zeros_like(after.gradients);
  if (skipped) return after;
  const bool given = step.corrections.defined();
  const double c1 = given ? number(step.corrections, 0) : step.correction1;
  const double c2 = given ? number(step.corrections, 1) : step.correction2;
  const double scale = step.gradient_scale.defined() ? number(step.gradient_scale, 0) : 1.0;
  const at::Tensor g = wide(range.gradients).mul(scale);
  const at::Tensor m = after.exp_avg.mul(step.beta1).add(g.mul(1.0 - step.beta1));
  const at::Tensor v = after.exp_avg_sq.mul(step.beta2).add(g.square().mul(1.0 - step.beta2));
  at::Tensor w = range.master.defined() ? after.master : after.weights;
  const at::Tensor decays = at::arange(w.size(0), w.options()).lt(step.decay_end);
  w = at::where(decays, w.mul(1.0 - step.learning_rate * step.weight_decay), w);
  w = w.sub(m.div(c1).div(v.div(c2).sqrt().add(step.eps)).mul(step.learning_rate));
  after.exp_avg = m;
  after.exp_avg_sq = v;
  after.weights = w;
  if (range.master.defined()) after.master = w;
  if (range.ema.defined()) {
    after.ema = after.ema.mul(step.ema_decay).add(w.mul(1.0 - step.ema_decay));
  }
  return after;
}

}  // namespace reference
}  // namespace dsv3::ops
