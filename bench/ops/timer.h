#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace dsv3::bench {

/// One way of doing some work, warmed up and ready to be timed.
struct Sampler {
  std::function<double()> sample;  // seconds of one run, the mean over `runs` back to back
  int64_t runs = 0;
  const char* timed = "";  // "graph", "launches" or "clock": see docs/performance.md
};

/// Times work on one device. Interface of two bodies: the host's clock and CUDA's events.
class Timer {
 public:
  virtual ~Timer() = default;

  /// Bytes of the device's last cache: inputs rotate over more than that.
  virtual int64_t cache_bytes() const = 0;

  /// `runs` are the same work on different inputs, which take turns within a sample and from one
  /// sample to the next.
  virtual Sampler prepare(const std::vector<std::function<void()>>& runs) = 0;

  /// A copy of one large buffer to another: `copied_bytes()` counts what it reads and writes.
  virtual Sampler prepare_copy() = 0;
  virtual int64_t copied_bytes() const = 0;

  /// Gives memory that nobody holds back to the device.
  virtual void release_memory() {}
};

/// Throws std::invalid_argument for CUDA in a build without it.
std::unique_ptr<Timer> make_timer(const c10::Device& device);

/// How often what takes `seconds_of_one` is done in a sample of `wanted_seconds`, a length that its
/// start and end do not disturb; at least once.
int64_t repeats_for(double seconds_of_one, double wanted_seconds);

namespace cuda {
std::unique_ptr<Timer> make_timer();
}

}  // namespace dsv3::bench
