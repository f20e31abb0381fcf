#include "monitor/console.h"

#include <fmt/format.h>

#include <cmath>

namespace dsv3 {
namespace {

constexpr int64_t kLinesPerHeader = 25;
constexpr auto kRedraw = std::chrono::milliseconds(100);

int step_width(int64_t total_steps) {
  return std::max<int>(11, 2 * static_cast<int>(std::to_string(total_steps).size()) + 1);
}

std::string number(double value, const char* format) {
  if (std::isnan(value)) return "-";
  return fmt::format(fmt::runtime(format), value);
}

}  // namespace

std::string progress_header(int64_t total_steps, bool bits) {
  std::string line =
      fmt::format("{:>{}} {:>7} {:>8}", "step", step_width(total_steps), "tokens", "loss");
  if (bits) line += fmt::format(" {:>9}", "bits/byte");
  return line + fmt::format(" {:>9} {:>9} {:>9} {:>8} {:>6} {:>9} {:>7}", "lr", "grad norm",
                            "tokens/s", "TFLOP/s", "MFU", "memory", "ETA");
}

std::string format_progress(const Record& record, int64_t total_steps, bool bits,
                            double seconds_left) {
  const auto loss =
      record.has(metric::kLoss) ? fmt::format("{:.4f}", record.get(metric::kLoss)) : "-";
  const double memory = record.has(metric::kGpuMemory) ? record.get(metric::kGpuMemory)
                                                       : record.get(metric::kHostMemory);
  const double tflops = record.get(metric::kTflops);
  std::string line =
      fmt::format("{:>{}} {:>7} {:>8}", fmt::format("{}/{}", record.step, total_steps),
                  step_width(total_steps), short_count(record.get(metric::kTokens)), loss);
  if (bits) line += fmt::format(" {:>9}", number(record.get(metric::kBitsPerByte), "{:.4f}"));
  return line + fmt::format(" {:>9} {:>9} {:>9} {:>8} {:>6} {:>9} {:>7}",
                            number(record.get(metric::kLearningRate), "{:.2e}"),
                            number(record.get(metric::kGradNorm), "{:.4g}"),
                            short_count(record.get(metric::kTokensPerSecond)),
                            number(tflops, tflops < 10 ? "{:.3f}" : "{:.1f}"),
                            number(100 * record.get(metric::kMfu), "{:.1f}%"),
                            number(memory, "{:.2f} GB"), short_time(seconds_left));
}

void Console::header_when_due() {
  if (lines_since_header_ >= 0 && lines_since_header_ < kLinesPerHeader) return;
  const auto header = progress_header(options_.total_steps, options_.bits_per_byte);
  const char* bold = options_.terminal ? "\x1b[1m" : "";
  fmt::print(options_.out, "{}{}{}\n", bold, header, options_.terminal ? "\x1b[0m" : "");
  lines_since_header_ = 0;
}

void Console::progress(const Record& record, double seconds_left) {
  const bool last = record.step == options_.total_steps;
  const auto now = std::chrono::steady_clock::now();
  if (options_.terminal ? !last && now - last_drawn_ < kRedraw
                        : !last && record.step != 1 && record.step % options_.every != 0)
    return;
  last_drawn_ = now;
  if (!line_open_) header_when_due();
  const auto line =
      format_progress(record, options_.total_steps, options_.bits_per_byte, seconds_left);
  if (options_.terminal) {
    fmt::print(options_.out, "\r\x1b[K\x1b[36m{}\x1b[0m", line);
    line_open_ = true;
  } else {
    fmt::print(options_.out, "{}\n", line);
    ++lines_since_header_;
  }
  std::fflush(options_.out);
}

void Console::keep_line() {
  if (!line_open_) return;
  std::fputc('\n', options_.out);
  line_open_ = false;
  ++lines_since_header_;
}

void Console::message(std::string_view text) {
  keep_line();
  fmt::print(options_.out, "{}\n", text);
  if (lines_since_header_ >= 0) ++lines_since_header_;
  std::fflush(options_.out);
}

void Console::warning(std::string_view text) {
  message(options_.terminal ? fmt::format("\x1b[33mwarning: {}\x1b[0m", text)
                            : fmt::format("warning: {}", text));
}

}  // namespace dsv3
