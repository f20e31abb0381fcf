#include "cli/progress_bar.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "monitor/metrics.h"

namespace dsv3::cli {
namespace {

constexpr auto kRedraw = std::chrono::milliseconds(100);
constexpr auto kLine = std::chrono::seconds(10);

}  // namespace

ProgressBar::ProgressBar(std::string label)
    : label_(std::move(label)), terminal_(isatty(STDERR_FILENO) == 1) {}

ProgressBar::~ProgressBar() {
  clear();
}

void ProgressBar::show(double done, const std::string& text) {
  const auto now = Clock::now();
  if (terminal_ ? open_ && now - last_ < kRedraw : now - last_ < kLine) return;
  last_ = now;
  done = std::clamp(done, 0.0, 1.0);
  const double left = done > 0 ? seconds() * (1 - done) / done : -1;
  const std::string line = fmt::format("{:3.0f}%  {}  ETA {}", 100 * done, text, short_time(left));
  if (!terminal_) {
    fmt::print(stderr, "{}: {}\n", label_, line);
    return;
  }
  constexpr int kWidth = 24;
  const int filled = static_cast<int>(done * kWidth);
  fmt::print(stderr, "\r\x1b[K[{:#<{}}{:-<{}}] {}", "", filled, "", kWidth - filled, line);
  std::fflush(stderr);
  open_ = true;
}

void ProgressBar::clear() {
  if (open_) fmt::print(stderr, "\r\x1b[K");
  std::fflush(stderr);
  open_ = false;
}

double ProgressBar::seconds() const {
  return std::chrono::duration<double>(Clock::now() - start_).count();
}

}  // namespace dsv3::cli
