// Times work on the GPU with events. A sample is one CUDA graph that holds many runs back to back,
// so that the host's launches do not count; runs rotate over inputs larger than the L2 cache, and
// before each sample a buffer larger than it is overwritten, which also keeps the GPU busy while
// the host queues the sample.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "bench/ops/timer.h"

namespace dsv3::bench::cuda {
namespace {

constexpr double kSampleSeconds = 1e-3;
constexpr int64_t kCopyBytes = int64_t{1} << 30;
constexpr int64_t kMostRunsInGraph = 1024;

void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess)
    throw CudaError(fmt::format("{}: {}", call, cudaGetErrorString(status)));
}

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaTimer final : public Timer {
 public:
  // Capture needs a stream of its own; LibTorch's operators and ours follow the current one.
  CudaTimer()
      : stream_(c10::cuda::getStreamFromPool()),
        guard_(stream_),
        flushed_(at::empty({4 * cache_bytes()}, at::TensorOptions(at::kCUDA).dtype(at::kByte))) {}

  int64_t cache_bytes() const override {
    return at::cuda::getCurrentDeviceProperties()->l2CacheSize;
  }

  Sampler prepare(const std::vector<std::function<void()>>& runs) override {
    const auto sets = static_cast<int64_t>(runs.size());
    const auto repeat = [runs](int64_t repeats) {
      for (int64_t i = 0; i < repeats; ++i)
        for (const auto& run : runs) run();
    };
    repeat(1);
    synchronize();
    const double seconds = timed([&] { repeat(1); });
    const int64_t most = std::max<int64_t>(1, kMostRunsInGraph / sets);
    const int64_t repeats = std::min(repeats_for(seconds, kSampleSeconds), most);
    const auto count = sets * repeats;
    const auto divided = [this, count](const std::function<void()>& work) {
      return timed(work) / static_cast<double>(count);
    };
    // Blocks of the warm-up would stand beside the graph's own.
    release_memory();
    const auto graph = capture([&] { repeat(repeats); });
    if (!graph) {
      return {.sample = [=] { return divided([&] { repeat(repeats); }); },
              .runs = count,
              .timed = "launches"};
    }
    graph->replay();
    synchronize();
    return {.sample = [=] { return divided([&] { graph->replay(); }); },
            .runs = count,
            .timed = "graph"};
  }

  Sampler prepare_copy() override {
    const auto bytes = at::TensorOptions(at::kCUDA).dtype(at::kByte);
    const at::Tensor from = at::zeros({kCopyBytes}, bytes), to = at::zeros({kCopyBytes}, bytes);
    const auto copy = [from, to] { to.copy_(from, /*non_blocking=*/true); };
    copy();
    synchronize();
    return {.sample = [=, this] { return timed(copy); }, .runs = 1, .timed = "launches"};
  }

  int64_t copied_bytes() const override { return 2 * kCopyBytes; }

  void release_memory() override {
    synchronize();
    c10::cuda::CUDACachingAllocator::emptyCache();
  }

 private:
  void synchronize() { check(cudaStreamSynchronize(stream_.stream()), "cudaStreamSynchronize"); }

  /// Seconds between the events around `work`, after the cache was overwritten.
  double timed(const std::function<void()>& work) {
    flushed_.zero_();
    check(cudaEventRecord(begin_.get(), stream_.stream()), "cudaEventRecord");
    work();
    check(cudaEventRecord(end_.get(), stream_.stream()), "cudaEventRecord");
    check(cudaEventSynchronize(end_.get()), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()), "cudaEventElapsedTime");
    return milliseconds * 1e-3;
  }

  /// Null when `work` asks the host for something, which a graph cannot hold.
  static std::shared_ptr<at::cuda::CUDAGraph> capture(const std::function<void()>& work) {
    auto graph = std::make_shared<at::cuda::CUDAGraph>();
    bool captured = true;
    graph->capture_begin();
    try {
      work();
    } catch (const std::exception&) {
      captured = false;
    }
    try {
      graph->capture_end();
    } catch (const std::exception&) {
      captured = false;
    }
    if (captured) return graph;
    cudaGetLastError();
    return nullptr;
  }

  c10::cuda::CUDAStream stream_;
  c10::cuda::CUDAStreamGuard guard_;
  at::Tensor flushed_;
  Event begin_, end_;
};

}  // namespace

std::unique_ptr<Timer> make_timer() {
  return std::make_unique<CudaTimer>();
}

}  // namespace dsv3::bench::cuda
