#pragma once

namespace dsv3 {

/// While it lives, the first SIGINT or SIGTERM asks the run to stop after the step at hand; the
/// second one ends the process at once with exit code 128 + its number. SIGUSR1 asks for a save.
/// One at a time; the previous handlers return at the end.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  /// Whether SIGINT or SIGTERM has arrived.
  static bool requested();
  /// Which one: SIGINT or SIGTERM; 0 = none.
  static int signal();
  /// Whether SIGUSR1 has arrived since the last call.
  static bool take_save_request();
};

}  // namespace dsv3
