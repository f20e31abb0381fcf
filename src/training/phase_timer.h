#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <utility>
#include <vector>

namespace dsv3 {

/// What an optimizer step's device time is split into.
enum class Phase : uint8_t { kForward, kBackward, kOptimizer };
inline constexpr size_t kNumPhases = 3;
using PhaseSeconds = std::array<double, kNumPhases>;

/// Measures the phases of one step: on CUDA by events in the stream (nothing waits), on the CPU by
/// the clock. Phases may alternate; each one's stretches are added.
class PhaseTimer {
 public:
  explicit PhaseTimer(const at::Device& device) : device_(device) {}

  /// What is queued from here on belongs to `phase`; ends the stretch before.
  void begin(Phase phase) { mark(static_cast<int>(phase)); }
  void end() { mark(kNone); }

  /// Seconds by phase. On CUDA only after everything before end() has run there, which the caller
  /// has waited for in another way (a copy behind it).
  PhaseSeconds seconds() const;

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int kNone = -1;
  void mark(int phase);

  at::Device device_;
  std::vector<int> phases_;  // that begin at each mark
  std::vector<c10::Event> events_;
  std::vector<Clock::time_point> times_;
};

}  // namespace dsv3
