#include "checkpoint/snapshot.h"

#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

#include "base/error.h"
#include "checkpoint/host_memory.h"

namespace dsv3 {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// `live` with every tensor replaced by host memory of its size.
StateTensors host_like(const StateTensors& live) {
  const auto like = [](const at::Tensor& tensor) {
    if (!tensor.defined()) return at::Tensor();
    return detail::host_tensor(tensor.numel(), tensor.scalar_type(), tensor.is_cuda())
        .view(tensor.sizes());
  };
  StateTensors host;
  for (const at::Tensor& tensor : live.values) host.values.push_back(like(tensor));
  for (const at::Tensor& tensor : live.buffers) host.buffers.push_back(like(tensor));
  for (const Companion& companion : live.companions) {
    host.companions.push_back({companion.prefix, {}});
    for (const at::Tensor& flat : companion.flats)
      host.companions.back().flats.push_back(like(flat));
  }
  return host;
}

bool same_layout(const StateTensors& a, const StateTensors& b) {
  const auto x = a.all(), y = b.all();
  if (x.size() != y.size() || a.companions.size() != b.companions.size()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i].sizes() != y[i].sizes() || x[i].scalar_type() != y[i].scalar_type()) return false;
  }
  for (size_t i = 0; i < a.companions.size(); ++i) {
    if (a.companions[i].prefix != b.companions[i].prefix) return false;
  }
  return true;
}

}  // namespace

uint64_t detail::available_host_bytes() {
  std::ifstream file("/proc/meminfo");
  for (std::string name, rest; file >> name; std::getline(file, rest)) {
    uint64_t kilobytes = 0;
    if (name == "MemAvailable:" && file >> kilobytes) return kilobytes * 1024;
  }
  return std::numeric_limits<uint64_t>::max();
}

Snapshot::~Snapshot() {
  try {
    if (copied_) copied_->synchronize();  // the copies write into memory that goes away now
  } catch (...) {
  }
}

bool Snapshot::fits(const StateTensors& live) const {
  if (same_layout(live, host_)) return true;
  const double needed = 1.05 * static_cast<double>(live.num_bytes());
  return needed < static_cast<double>(detail::available_host_bytes());
}

void Snapshot::reserve(const StateTensors& live) {
  const c10::AutoGradMode no_gradients(false);
  if (same_layout(live, host_)) return;
  host_ = {};  // given back before as much is taken again
  host_ = host_like(live);
}

void Snapshot::begin(const StateTensors& live) {
  const c10::AutoGradMode no_gradients(false);
  reserve(live);
  live_ = live;
  const auto sources = live_.all(), targets = host_.all();
  bool any_host = false;
  for (size_t i = 0; i < sources.size(); ++i) {
    DSV3_CHECK(sources[i].is_contiguous(), "tensor {} of a snapshot is not contiguous", i);
    if (!sources[i].is_cuda()) {
      any_host = true;
      continue;
    }
    if (!must_block_) follow_current_stream(sources[i].device());
    const c10::StreamGuard on_side(*stream_);
    targets[i].copy_(sources[i], /*non_blocking=*/true);
  }
  if (must_block_) {
    copied_.emplace(at::kCUDA);
    copied_->record(*stream_);
  }
  const std::lock_guard lock(mutex_);
  host_pending_ = any_host;
}

void Snapshot::follow_current_stream(const at::Device& device) {
  const c10::impl::VirtualGuardImpl guard(at::kCUDA);
  if (!stream_) stream_ = guard.getStreamFromGlobalPool(device);
  c10::Event now(at::kCUDA);
  now.record(guard.getStream(device));
  now.block(*stream_);
  must_block_ = true;
}

void Snapshot::finish() {
  const auto sources = live_.all(), targets = host_.all();
  for (size_t i = 0; i < sources.size(); ++i) {
    if (sources[i].is_cuda() || sources[i].nbytes() == 0) continue;
    std::memcpy(targets[i].mutable_data_ptr(), sources[i].const_data_ptr(), sources[i].nbytes());
  }
  {
    const std::lock_guard lock(mutex_);
    host_pending_ = false;
  }
  changed_.notify_all();
  if (copied_) copied_->synchronize();
}

double Snapshot::before_change(const at::Device& device) {
  const auto start = Clock::now();
  if (device.is_cpu()) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !host_pending_; });
    return seconds_since(start);
  }
  if (!must_block_ || !copied_) return 0;
  must_block_ = false;
  const auto current = c10::impl::VirtualGuardImpl(at::kCUDA).getStream(device);
  before_wait_.emplace(at::kCUDA, c10::EventFlag::BACKEND_DEFAULT);
  after_wait_.emplace(at::kCUDA, c10::EventFlag::BACKEND_DEFAULT);
  before_wait_->record(current);
  copied_->block(current);
  after_wait_->record(current);
  return seconds_since(start);
}

double Snapshot::device_stall() {
  if (!before_wait_) return 0;
  after_wait_->synchronize();
  const double seconds = before_wait_->elapsedTime(*after_wait_) / 1000;
  before_wait_.reset();
  after_wait_.reset();
  return seconds;
}

}  // namespace dsv3
