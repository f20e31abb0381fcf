#pragma once

#include <filesystem>

namespace dsv3 {

/// Records what runs on the CPU and the GPU (CUPTI, through LibTorch's Kineto) between start() and
/// stop(), with our own ranges (ops/range.h). One recording at a time in the process.
class Profiler {
 public:
  Profiler() = default;
  ~Profiler();
  Profiler(const Profiler&) = delete;
  Profiler& operator=(const Profiler&) = delete;

  /// `cuda`: kernels and copies too; synchronises the device first, so that earlier work stays out.
  void start(bool cuda);
  /// Ends the recording and writes a Chrome trace (JSON; chrome://tracing, Perfetto) with the
  /// tracks of training/trace_ranges.h. Throws IoError.
  void stop(const std::filesystem::path& trace);
  bool running() const { return running_; }

 private:
  bool running_ = false;
  bool cuda_ = false;
};

}  // namespace dsv3
