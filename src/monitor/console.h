#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

#include "monitor/metrics.h"

namespace dsv3 {

/// The titles above format_progress()'s columns, equally wide. `bits`: the column of bits per byte
/// is shown.
std::string progress_header(int64_t total_steps, bool bits);

/// One step as one line: step/total, tokens, loss, bits per byte, learning rate, gradient norm,
/// tokens/s, model TFLOP/s, MFU, memory, time left. What the record lacks is "-".
std::string format_progress(const Record& record, int64_t total_steps, bool bits,
                            double seconds_left);

/// The console's view of a run: plain lines into a file or pipe; on a terminal one line that is
/// rewritten in place, with colours, and permanent lines for everything else.
class Console {
 public:
  struct Options {
    std::FILE* out = stderr;  // not owned
    bool terminal = false;    // rewrite in place, use colours
    int64_t total_steps = 0;
    int64_t every = 1;  // steps between plain lines; the last step is always shown
    bool bits_per_byte = false;
  };

  explicit Console(const Options& options) : options_(options) {}
  ~Console() { keep_line(); }
  Console(const Console&) = delete;
  Console& operator=(const Console&) = delete;

  void progress(const Record& record, double seconds_left);
  /// A line that stays, after the current progress line.
  void message(std::string_view text);
  void warning(std::string_view text);

 private:
  void keep_line();
  void header_when_due();

  Options options_;
  bool line_open_ = false;           // a progress line without its newline stands on the terminal
  int64_t lines_since_header_ = -1;  // -1: no header yet
  std::chrono::steady_clock::time_point last_drawn_{};
};

}  // namespace dsv3
