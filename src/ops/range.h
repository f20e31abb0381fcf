#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace dsv3::ops {

namespace detail {
extern std::atomic<bool> ranges_on;
}

/// Whether ranges are recorded; set by the profiler for the time of a recording.
void record_ranges(bool on);

/// Names what the thread does while it lives, for the profiler. Ranges nest: the recorded name is
/// the path of all that are open, "step 3/micro-batch 0/forward/layer 1/moe/grouped_linear". Costs
/// the test of one flag while nothing is recorded.
class Range {
 public:
  /// A whole path, whatever is open on this thread.
  struct Path {
    std::string text;
  };

  explicit Range(const char* name) {
    if (detail::ranges_on.load(std::memory_order_relaxed)) open_inside(name);
  }
  /// "name number".
  Range(const char* name, int64_t number) {
    if (detail::ranges_on.load(std::memory_order_relaxed))
      open_inside(std::string(name) + " " + std::to_string(number));
  }
  explicit Range(const Path& path) {
    if (detail::ranges_on.load(std::memory_order_relaxed) && !path.text.empty()) open(path.text);
  }
  ~Range() {
    if (state_ != nullptr) close();
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

  /// The path of the backward pass of what is open on this thread: "forward" in it replaced by
  /// "backward". Empty while nothing is recorded.
  static Path backward_path();

 private:
  struct State;
  void open_inside(const std::string& name);
  void open(std::string path);
  void close();

  State* state_ = nullptr;
};

}  // namespace dsv3::ops
