#pragma once

namespace dsv3 {

/// While it lives, the first SIGINT or SIGTERM asks the run to stop after the step at hand; the
/// second one ends the process at once with exit code 130. One at a time; the previous handlers
/// return at the end.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  /// Whether a signal has arrived.
  static bool requested();
};

}  // namespace dsv3
