#pragma once

#include <chrono>
#include <string>

namespace dsv3::cli {

/// Progress of a command on stderr, with the time left: a bar that is rewritten on a terminal, a
/// line every ten seconds elsewhere. Short commands show nothing where no terminal is.
class ProgressBar {
 public:
  explicit ProgressBar(std::string label);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  /// `done`: the share that is done, 0 … 1. `text` says where the work is.
  void show(double done, const std::string& text);
  /// Takes the bar away, before something else is printed; the next show() draws it again.
  void clear();
  double seconds() const;  // since the beginning

 private:
  using Clock = std::chrono::steady_clock;
  const std::string label_;
  const bool terminal_;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point last_ = start_;  // shown
  bool open_ = false;                // a bar stands on the terminal
};

}  // namespace dsv3::cli
