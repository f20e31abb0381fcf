#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.h"
#include "base/file.h"
#include "monitor/console.h"
#include "monitor/hardware.h"
#include "monitor/jsonl.h"
#include "monitor/run_log.h"
#include "monitor/run_monitor.h"

namespace dsv3 {
namespace {

class MonitorTest : public testing::Test {
 protected:
  MonitorTest() {
    char name[] = "/tmp/dsv3_monitor_XXXXXX";
    directory_ = mkdtemp(name);
  }
  ~MonitorTest() override { std::filesystem::remove_all(directory_); }
  std::filesystem::path directory_;
};

Record sample_record(int64_t step) {
  Record record;
  record.step = step;
  record.add(metric::kLoss, 2.34567);
  record.add(metric::kBitsPerByte, 3.3841);
  record.add(metric::kLearningRate, 2.2e-4);
  record.add(metric::kGradNorm, 0.8125);
  record.add(metric::kTokens, 409600);
  record.add(metric::kTokensPerSecond, 12345);
  record.add(metric::kTflops, 0.4321);
  record.add(metric::kHostMemory, 1.25);
  return record;
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

TEST_F(MonitorTest, ShortCountsKeepThreeDigits) {
  EXPECT_EQ(short_count(0), "0");
  EXPECT_EQ(short_count(999.4), "999");
  EXPECT_EQ(short_count(999.6), "1.00K");
  EXPECT_EQ(short_count(12345), "12.3K");
  EXPECT_EQ(short_count(999999), "1.00M");
  EXPECT_EQ(short_count(671.03e9), "671B");
  EXPECT_EQ(short_count(14.8e12), "14.8T");
  EXPECT_EQ(short_count(std::nan("")), "-");
}

TEST_F(MonitorTest, ShortTimes) {
  EXPECT_EQ(short_time(0.4), "0s");
  EXPECT_EQ(short_time(59.6), "1m00s");
  EXPECT_EQ(short_time(3599), "59m59s");
  EXPECT_EQ(short_time(3600 * 2 + 7 * 60), "2h07m");
  EXPECT_EQ(short_time(86400 * 5 + 3600 * 3), "5d03h");
  EXPECT_EQ(short_time(std::numeric_limits<double>::infinity()), "-");
}

TEST_F(MonitorTest, ProgressLineStandsUnderItsHeader) {
  for (const bool bits : {false, true}) {
    for (const int64_t total : {int64_t{9}, int64_t{1000}, int64_t{12345678}}) {
      const auto header = progress_header(total, bits);
      const auto line = format_progress(sample_record(7), total, bits, 125);
      EXPECT_EQ(header.size(), line.size()) << header << "\n" << line;
      EXPECT_EQ(line.find("3.3841") != std::string::npos, bits);
    }
  }
  EXPECT_EQ(format_progress(sample_record(7), 1000, true, 125),
            "     7/1000    410K   2.3457    3.3841  2.20e-04    0.8125     12.3K    0.432      -  "
            " 1.25 GB"
            "   2m05s");
}

TEST_F(MonitorTest, ProgressLineShowsMfuGpuMemoryAndBadNumbers) {
  Record record;
  record.step = 3;
  record.add(metric::kLoss, std::nan(""));
  record.add(metric::kMfu, 0.412);
  record.add(metric::kGpuMemory, 75.5);
  record.add(metric::kHostMemory, 1.0);
  const auto line = format_progress(record, 10, false, 1);
  EXPECT_NE(line.find("nan"), std::string::npos) << line;
  EXPECT_NE(line.find("41.2%"), std::string::npos) << line;
  EXPECT_NE(line.find("75.50 GB"), std::string::npos) << line;
}

TEST_F(MonitorTest, JsonLinesParseAndNameEveryMetric) {
  const auto path = directory_ / "metrics.jsonl";
  auto record = sample_record(1);
  record.add(metric::kMaxViolation, std::numeric_limits<double>::infinity());
  {
    JsonlSink sink(path);
    sink.write(record);
    // Flushed at once: a reader sees the line while the sink is open.
    EXPECT_EQ(lines_of(read_file(path)).size(), 1u);
    sink.write(sample_record(2));
  }
  const auto lines = lines_of(read_file(path));
  ASSERT_EQ(lines.size(), 2u);
  const auto first = nlohmann::json::parse(lines[0]);
  EXPECT_EQ(first["step"], 1);
  EXPECT_EQ(first["train/loss"], 2.34567);
  EXPECT_EQ(first["train/lr"], 2.2e-4);
  EXPECT_TRUE(first["moe/max_vio"].is_null());
  EXPECT_EQ(nlohmann::json::parse(lines[1])["step"], 2);
}

TEST_F(MonitorTest, EventLinesStandBetweenTheSteps) {
  const auto path = directory_ / "metrics.jsonl";
  const auto before = std::chrono::system_clock::now();
  {
    RunMonitor monitor(directory_, {.out = stderr, .total_steps = 4, .every = 100});
    monitor.step(sample_record(2), 1);
    monitor.event(2, "checkpoint",
                  {{"path", "step_2"},
                   {"seconds", 1.5},
                   {"bytes", int64_t{1} << 40},
                   {"whole", true},
                   {"samples", std::vector<int64_t>{3, 5}},
                   {"tensors", std::vector<std::string>{"a", "\xff"}}});
    monitor.event(3, "resume");
  }
  const auto lines = lines_of(read_file(path));
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_FALSE(nlohmann::json::parse(lines[0]).contains("event"));
  const auto event = nlohmann::json::parse(lines[1]);
  EXPECT_EQ(event["event"], "checkpoint");
  EXPECT_EQ(event["step"], 2);
  EXPECT_EQ(event["path"], "step_2");
  EXPECT_EQ(event["seconds"], 1.5);
  EXPECT_EQ(event["bytes"], int64_t{1} << 40);
  EXPECT_EQ(event["whole"], true);
  EXPECT_EQ(event["samples"], (std::vector<int64_t>{3, 5}));
  EXPECT_EQ(event["tensors"][0], "a");
  EXPECT_EQ(nlohmann::json::parse(lines[2])["event"], "resume");
  for (const auto& line : lines) {
    const double time = nlohmann::json::parse(line)["time"];
    const double start = std::chrono::duration<double>(before.time_since_epoch()).count();
    EXPECT_GE(time, start - 0.001);
    EXPECT_LT(time, start + 3600);
  }
}

TEST_F(MonitorTest, UnwritablePathsAreNamed) {
  const auto path = directory_ / "absent" / "metrics.jsonl";
  try {
    JsonlSink sink(path);
    FAIL() << "a missing directory was accepted";
  } catch (const IoError& error) {
    EXPECT_NE(std::string(error.what()).find(path.string()), std::string::npos) << error.what();
  }
  std::filesystem::create_directory(directory_ / "log.txt");
  EXPECT_THROW(RunLog(directory_ / "log.txt"), IoError);
}

TEST_F(MonitorTest, FullDiskIsReported) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  JsonlSink sink("/dev/full");
  EXPECT_THROW(sink.write(sample_record(1)), IoError);
}

TEST_F(MonitorTest, LogLinesAreDatedAndLevelled) {
  {
    RunLog log(directory_ / "log.txt");
    log.info("braces {} stay");
    log.warn("careful");
  }
  const auto lines = lines_of(read_file(directory_ / "log.txt"));
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_TRUE(lines[0].starts_with("20")) << lines[0];
  EXPECT_NE(lines[0].find("info: braces {} stay"), std::string::npos) << lines[0];
  EXPECT_NE(lines[1].find("warning: careful"), std::string::npos) << lines[1];
}

std::string console_output(Console::Options options, const std::filesystem::path& path,
                           int64_t steps) {
  options.out = std::fopen(path.c_str(), "w");
  options.total_steps = steps;
  {
    Console console(options);
    for (int64_t step = 1; step <= steps; ++step) {
      console.progress(sample_record(step), 10);
      if (step == 2) console.message("evaluation");
    }
  }
  std::fclose(options.out);
  return read_file(path);
}

TEST_F(MonitorTest, PlainConsoleHasOneLinePerLoggedStepAndRepeatsItsHeader) {
  const auto lines = lines_of(console_output({.every = 2}, directory_ / "out", 101));
  int64_t headers = 0, steps = 0;
  for (const auto& line : lines) {
    EXPECT_EQ(line.find('\x1b'), std::string::npos);
    headers += line.find("grad norm") != std::string::npos;
    steps += line.find("/101") != std::string::npos;
  }
  EXPECT_EQ(steps, 1 + 50 + 1);  // the first, every second, the last
  EXPECT_GE(headers, 2);
}

TEST_F(MonitorTest, TerminalConsoleRewritesOneLine) {
  const auto text = console_output({.terminal = true}, directory_ / "out", 1);
  EXPECT_NE(text.find("\r\x1b[K"), std::string::npos);
  EXPECT_EQ(lines_of(text).size(), 2u);  // header and the line itself
  EXPECT_TRUE(text.ends_with('\n'));     // the line is kept at the end
}

TEST_F(MonitorTest, PeaksOfKnownDevices) {
  EXPECT_EQ(peak_bf16_tflops("NVIDIA H200"), 989.4);
  EXPECT_EQ(peak_bf16_tflops("NVIDIA H100 80GB HBM3"), 989.4);
  EXPECT_EQ(peak_bf16_tflops("NVIDIA A100-SXM4-80GB"), 312.0);
  EXPECT_EQ(peak_bf16_tflops("NVIDIA H20"), 148.0);
  EXPECT_FALSE(peak_bf16_tflops("Some CPU").has_value());
  EXPECT_GT(resident_bytes(), 1 << 20);
}

}  // namespace
}  // namespace dsv3
