#include "training/profiler.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <set>
#include <utility>

#include "base/error.h"
#include "ops/range.h"
#include "training/trace_ranges.h"

namespace dsv3 {

namespace kineto = torch::autograd::profiler;
namespace impl = torch::profiler::impl;

namespace {

void synchronize_gpu() {
  const c10::impl::VirtualGuardImpl gpu(at::kCUDA);
  gpu.synchronizeDevice(gpu.getDevice().index());
}

}  // namespace

Profiler::~Profiler() {
  if (!running_) return;
  ops::record_ranges(false);
  try {
    kineto::disableProfiler();
  } catch (...) {  // a destructor must not throw; the trace is lost, the run is not
  }
}

void Profiler::start(bool cuda) {
  DSV3_CHECK(!running_, "the profiler is already recording");
  if (cuda) synchronize_gpu();  // earlier work stays out
  const impl::ProfilerConfig config(impl::ProfilerState::KINETO);
  std::set<impl::ActivityType> activities{impl::ActivityType::CPU};
  if (cuda) activities.insert(impl::ActivityType::CUDA);
  kineto::prepareProfiler(config, activities);
  kineto::enableProfiler(config, activities);
  ops::record_ranges(true);
  running_ = true;
  cuda_ = cuda;
}

void Profiler::stop(const std::filesystem::path& trace) {
  DSV3_CHECK(running_, "the profiler is not recording");
  running_ = false;
  ops::record_ranges(false);
  // Note: the host is ahead; without this the trace would end before the last step's kernels ran.
  if (cuda_) synchronize_gpu();
  const auto result = kineto::disableProfiler();
  result->save(trace.string());
  if (!std::filesystem::exists(trace)) {
    throw IoError(fmt::format("cannot write the trace {}", trace.string()));
  }
  add_range_tracks(trace);
}

}  // namespace dsv3
