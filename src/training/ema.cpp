#include "training/ema.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cmath>

#include "base/error.h"
#include "kernels/average.h"
#include "ops/autograd.h"
#include "ops/dispatch.h"

namespace dsv3 {

Ema::Ema(const EmaConfig& config, std::vector<at::Tensor> weights)
    : config_(config), weights_(std::move(weights)) {
  DSV3_CHECK(!weights_.empty() && config_.decay > 0, "an average needs weights and a decay");
  const ops::NoRecord guard;
  for (const auto& weight : weights_)
    average_.push_back(at::zeros({weight.numel()}, at::TensorOptions(at::kFloat)));
  const at::Device device = weights_.front().device();
  if (!device.is_cuda()) return;
  for (const auto& weight : weights_)
    staging_.push_back(
        at::empty({weight.numel()}, at::TensorOptions(weight.scalar_type()).pinned_memory(true)));
  const c10::impl::VirtualGuardImpl cuda(at::kCUDA);
  stream_ = cuda.getStreamFromGlobalPool(device);
  copied_.emplace(at::kCUDA);
  thread_ = std::thread([this] { work(); });
}

Ema::~Ema() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Ema::before_change() {
  if (!must_wait_) return;
  const c10::impl::VirtualGuardImpl cuda(at::kCUDA);
  copied_->block(cuda.getStream(weights_.front().device()));
  must_wait_ = false;
}

void Ema::after_step(int64_t step) {
  if (step % config_.every != 0) return;
  wait();
  const auto n = static_cast<double>(updates_++);
  const double decay = std::pow(config_.decay, static_cast<double>(config_.every));
  const double rate = 1 - std::min(decay, n / (n + 1));
  if (staging_.empty()) return average_from(weights_, rate);
  start_copy();
  {
    const std::lock_guard lock(mutex_);
    rate_ = rate;
    busy_ = true;
  }
  changed_.notify_all();
}

void Ema::start_copy() {
  const ops::NoRecord guard;
  const c10::impl::VirtualGuardImpl cuda(at::kCUDA);
  c10::Event changed(at::kCUDA);  // the weights are as this step leaves them
  changed.record(cuda.getStream(weights_.front().device()));
  changed.block(*stream_);
  const c10::StreamGuard on_stream(*stream_);
  for (size_t i = 0; i < weights_.size(); ++i)
    staging_[i].copy_(weights_[i].detach(), /*non_blocking=*/true);
  copied_->record(*stream_);
  must_wait_ = true;
}

void Ema::wait() {
  if (!thread_.joinable()) return;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !busy_; });
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Ema::average_from(const std::vector<at::Tensor>& weights, double rate) {
  if (before_average) before_average();
  for (size_t i = 0; i < weights.size(); ++i)
    kernels::cpu::moving_average({.size = weights[i].numel(),
                                  .dtype = ops::dtype_of(weights[i], "moving_average", "x"),
                                  .x = weights[i].const_data_ptr(),
                                  .average = average_[i].data_ptr<float>(),
                                  .rate = static_cast<float>(rate)});
}

void Ema::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return busy_ || stop_; });
    if (!busy_) return;
    const double rate = rate_;
    lock.unlock();
    std::exception_ptr error;
    try {
      copied_->synchronize();
      average_from(staging_, rate);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    error_ = error;
    busy_ = false;
    changed_.notify_all();
  }
}

AveragedWeights::AveragedWeights(ParameterSet& parameters, const std::vector<at::Tensor>& average)
    : parameters_(parameters) {
  const ops::NoRecord guard;
  auto& buckets = parameters.buckets();
  DSV3_CHECK(average.size() == buckets.size(), "{} averages of {} buckets", average.size(),
             buckets.size());
  for (size_t i = 0; i < buckets.size(); ++i) {
    const at::Tensor values = buckets[i].values.detach();
    own_.push_back(values.is_cuda() ? values.cpu() : values.clone());
    values.copy_(average[i]);
  }
}

AveragedWeights::~AveragedWeights() {
  try {
    const ops::NoRecord guard;
    for (size_t i = 0; i < own_.size(); ++i)
      parameters_.buckets()[i].values.detach().copy_(own_[i]);
  } catch (...) {  // a destructor must not throw; a GPU that fails here fails its next call too
  }
}

}  // namespace dsv3
