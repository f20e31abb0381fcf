#include "optim/adamw.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "base/error.h"
#include "kernels/optimizer.h"
#include "ops/adamw.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"

namespace dsv3 {
namespace {

at::ScalarType moment_type(DType dtype) {
  require(dtype == DType::kF32 || dtype == DType::kBF16,
          "optimizer.moment_dtype: {}, but moments are fp32 or bf16", name_of(dtype));
  return dtype == DType::kF32 ? at::kFloat : at::kBFloat16;
}

}  // namespace

AdamW::AdamW(std::vector<Bucket>& buckets, const AdamWOptions& options)
    : buckets_(buckets), options_(options) {
  DSV3_CHECK(!buckets_.empty(), "the optimizer needs allocated parameters");
  require(options_.ema_decay >= 0 && options_.ema_decay < 1,
          "[adamw] ema_decay: expected at least 0 and below 1, got {}", options_.ema_decay);
  const ops::NoRecord guard;
  int64_t first_index = 0;
  for (const auto& bucket : buckets_) {
    DSV3_CHECK(bucket.grads.defined(), "the optimizer needs buckets with gradients");
    const auto like = bucket.values.options().requires_grad(false);
    State state;
    state.exp_avg = at::zeros({bucket.numel()}, like.dtype(moment_type(options_.moment_dtype)));
    state.exp_avg_sq = at::zeros({bucket.numel()}, like.dtype(moment_type(options_.moment_dtype)));
    if (options_.master_weights && bucket.values.scalar_type() == at::kBFloat16)
      state.master = at::empty({bucket.numel()}, like.dtype(at::kFloat));
    if (options_.ema_decay > 0) state.ema = at::empty({bucket.numel()}, like.dtype(at::kFloat));
    state.first_index = first_index;
    first_index += (bucket.numel() + 7) / 8 * 8;  // eight elements share their random words
    states_.push_back(std::move(state));
  }
  const auto device = buckets_.front().values.options().requires_grad(false);
  partials_ = at::empty({kernels::kSumOfSquaresPartials}, device.dtype(at::kDouble));
  sums_ = at::empty({static_cast<int64_t>(buckets_.size())}, device.dtype(at::kDouble));
  clip_factor_ = at::empty({1}, device.dtype(at::kFloat));
  int64_t parts = 0;
  for (const auto& bucket : buckets_) parts += kernels::adamw_partials(bucket.numel());
  moved_ = at::zeros({parts, 2}, device.dtype(at::kDouble));
  updates_ = at::zeros({1}, device.dtype(at::kLong));
  corrections_ = at::empty({2}, device.dtype(at::kFloat));
  reset_masters();
}

void AdamW::reset_masters() {
  const ops::NoRecord guard;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    if (states_[i].master.defined()) states_[i].master.copy_(buckets_[i].values);
    if (states_[i].ema.defined()) states_[i].ema.copy_(buckets_[i].values);
  }
}

std::vector<Companion> AdamW::state() const {
  Companion averages{"exp_avg", {}}, squares{"exp_avg_sq", {}};
  Companion masters{"master", {}}, means{"running_mean", {}};
  bool any_master = false, any_mean = false;
  for (const State& state : states_) {
    averages.flats.push_back(state.exp_avg);
    squares.flats.push_back(state.exp_avg_sq);
    masters.flats.push_back(state.master);
    means.flats.push_back(state.ema);
    any_master = any_master || state.master.defined();
    any_mean = any_mean || state.ema.defined();
  }
  std::vector<Companion> companions{std::move(averages), std::move(squares)};
  if (any_master) companions.push_back(std::move(masters));
  if (any_mean) companions.push_back(std::move(means));
  return companions;
}

GradientNorm AdamW::gradient_norm() {
  const auto stream = ops::stream_of(sums_);
  for (size_t i = 0; i < buckets_.size(); ++i) {
    const auto& grads = buckets_[i].grads;
    kernels::sum_of_squares({.size = grads.numel(),
                             .dtype = ops::dtype_of(grads, "adamw", "gradients"),
                             .x = grads.data_ptr(),
                             .partials = partials_.data_ptr<double>(),
                             .result = sums_.data_ptr<double>() + i},
                            stream);
  }
  GradientNorm result{at::empty({}, clip_factor_.options()),
                      at::empty({}, clip_factor_.options().dtype(at::kInt)),
                      {}};
  kernels::finish_norm({.count = static_cast<int32_t>(buckets_.size()),
                        .sums = sums_.data_ptr<double>(),
                        .max_norm = static_cast<float>(options_.clip),
                        .norm = result.norm.data_ptr<float>(),
                        .clip_factor = clip_factor_.data_ptr<float>(),
                        .not_finite = result.skip.data_ptr<int32_t>()},
                       stream);
  return result;
}

GradientNorm AdamW::decide(const StepGuard& guard) {
  const ops::NoRecord no_record;
  const auto& losses = guard.losses;
  DSV3_CHECK(!losses.defined() || (losses.scalar_type() == at::kDouble && losses.is_contiguous() &&
                                   losses.device() == sums_.device()),
             "losses: expected contiguous FP64 where the parameters are");
  ++steps_begun_;
  GradientNorm result = gradient_norm();
  kernels::decide_step({.num_losses = losses.defined() ? static_cast<int32_t>(losses.numel()) : 0,
                        .losses = losses.defined() ? losses.const_data_ptr<double>() : nullptr,
                        .loss_scale = guard.loss_scale,
                        .loss_limit = guard.loss_limit,
                        .beta1 = options_.beta1,
                        .beta2 = options_.beta2,
                        .updates = updates_.data_ptr<int64_t>(),
                        .corrections = corrections_.data_ptr<float>(),
                        .skip = result.skip.data_ptr<int32_t>()},
                       ops::stream_of(sums_));
  return result;
}

void AdamW::update(const Bucket& bucket, const State& state, double learning_rate,
                   const GradientNorm& norm, const at::Tensor& moved) {
  ops::adamw_({.weights = bucket.values,
               .master = state.master,
               .gradients = bucket.grads,
               .exp_avg = state.exp_avg,
               .exp_avg_sq = state.exp_avg_sq,
               .ema = state.ema},
              {.learning_rate = learning_rate,
               .beta1 = options_.beta1,
               .beta2 = options_.beta2,
               .eps = options_.eps,
               .weight_decay = options_.weight_decay,
               .decay_end = bucket.decay_end,
               .ema_decay = options_.ema_decay,
               .corrections = corrections_,
               .gradient_scale = clip_factor_,
               .skip = norm.skip,
               .zero_gradients = true,
               .stochastic_rounding = options_.stochastic_rounding,
               .seed = options_.seed,
               .step = static_cast<uint64_t>(steps_begun_),
               .first_index = state.first_index,
               .moved = moved});
}

void AdamW::apply(double learning_rate, GradientNorm& norm) {
  const ops::NoRecord guard;
  int64_t begin = 0;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    const int64_t parts = kernels::adamw_partials(buckets_[i].numel());
    update(buckets_[i], states_[i], learning_rate, norm, moved_.narrow(0, begin, parts));
    begin += parts;
  }
  norm.moved = at::sum(moved_, 0);
}

std::vector<at::Tensor> AdamW::weights() const {
  std::vector<at::Tensor> weights;
  for (size_t i = 0; i < buckets_.size(); ++i)
    weights.push_back(states_[i].master.defined() ? states_[i].master : buckets_[i].values);
  return weights;
}

void AdamW::restore_steps(int64_t begun, int64_t done) {
  steps_begun_ = begun;
  updates_.fill_(done);
}

int64_t AdamW::steps_done() const {
  return updates_.item<int64_t>();
}

GradientNorm AdamW::step(double learning_rate, const StepGuard& guard) {
  GradientNorm norm = decide(guard);
  apply(learning_rate, norm);
  return norm;
}

}  // namespace dsv3
