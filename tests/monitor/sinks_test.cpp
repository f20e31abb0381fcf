// The sinks that need no foreign reader: framing, files that fill up, Prometheus' text.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.h"
#include "base/file.h"
#include "monitor/event_file.h"
#include "monitor/jsonl.h"
#include "monitor/prometheus.h"
#include "monitor/run_monitor.h"
#include "monitor/tensorboard.h"

namespace dsv3 {
namespace {

class SinksTest : public testing::Test {
 protected:
  SinksTest() {
    char name[] = "/tmp/dsv3_sinks_XXXXXX";
    directory_ = mkdtemp(name);
  }
  ~SinksTest() override { std::filesystem::remove_all(directory_); }
  std::filesystem::path directory_;
};

/// While it lives no file of this process grows beyond `bytes`: a write over the border is short,
/// one behind it fails, as on a full disk.
class SizeLimit {
 public:
  explicit SizeLimit(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &old_);
    const rlimit limit{bytes, old_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~SizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &old_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit old_{};
  void (*handler_)(int);
};

Record record_of(int64_t step) {
  Record record{.step = step, .values = {}, .tables = {}};
  record.add(metric::kLoss, 2.5);
  return record;
}

/// Steps of a metrics.jsonl of whole, parsing lines.
std::vector<int64_t> steps_of(const std::filesystem::path& path) {
  const std::string text = read_file(path);
  EXPECT_TRUE(text.empty() || text.back() == '\n');
  std::istringstream lines(text);
  std::vector<int64_t> steps;
  for (std::string line; std::getline(lines, line);)
    steps.push_back(nlohmann::json::parse(line)["step"]);
  return steps;
}

TEST_F(SinksTest, Crc32cOfKnownTexts) {
  EXPECT_EQ(crc32c(""), 0u);
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);  // RFC 3720 B.4
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62A8AB43u);
}

TEST_F(SinksTest, RecordsAreFramedWithMaskedChecksums) {
  const auto path = directory_ / "records";
  {
    RecordFile file(path);
    file.append("abc");
    EXPECT_EQ(std::filesystem::file_size(path), 0u) << "nothing before a flush";
    file.flush();
    EXPECT_EQ(std::filesystem::file_size(path), 8u + 4 + 3 + 4);
    file.append(std::string(300, 'x'));
  }
  const std::string bytes = read_file(path);
  ASSERT_EQ(bytes.size(), 19u + 8 + 4 + 300 + 4);
  const auto number = [&bytes](size_t at) {
    uint32_t value = 0;
    std::memcpy(&value, bytes.data() + at, sizeof value);
    return value;
  };
  const auto masked = [](uint32_t crc) { return ((crc >> 15) | (crc << 17)) + 0xa282ead8u; };
  EXPECT_EQ(bytes.substr(0, 8), std::string("\3\0\0\0\0\0\0\0", 8));
  EXPECT_EQ(number(8), masked(crc32c(bytes.substr(0, 8))));
  EXPECT_EQ(bytes.substr(12, 3), "abc");
  EXPECT_EQ(number(15), masked(crc32c("abc")));
  EXPECT_EQ(number(19), 300u);
}

TEST_F(SinksTest, ARecordFileThatFillsUpEndsWithAWholeRecordAndGoesOnLater) {
  const auto path = directory_ / "records";
  RecordFile file(path);
  file.append(std::string(100, 'a'));
  file.flush();
  file.append(std::string(1000, 'b'));
  {
    const SizeLimit limit(600);
    EXPECT_THROW(file.flush(), IoError);
  }
  EXPECT_EQ(std::filesystem::file_size(path), 116u);
  file.flush();
  EXPECT_EQ(std::filesystem::file_size(path), 116u + 1016);
}

TEST_F(SinksTest, HalfALineIsCutOffWhenARunGoesOn) {
  const auto path = directory_ / "metrics.jsonl";
  const std::string whole = "{\"step\": 1}\n",
                    long_half = "{\"step\": 2, \"x\": " + std::string(9000, '1');
  for (const std::string& half : {std::string(), std::string("{\"st"), long_half}) {
    for (const std::string& before : {std::string(), whole}) {
      write_file_atomically(path, before + half);
      JsonlSink(path).write(record_of(3));
      auto expected = before.empty() ? std::vector<int64_t>{3} : std::vector<int64_t>{1, 3};
      EXPECT_EQ(steps_of(path), expected) << half.size();
    }
  }
}

TEST_F(SinksTest, LinesThatFoundNoRoomFollowLater) {
  const auto path = directory_ / "metrics.jsonl";
  JsonlSink sink(path);
  sink.write(record_of(1));
  {
    const SizeLimit limit(std::filesystem::file_size(path) + 10);
    EXPECT_THROW(sink.write(record_of(2)), IoError);
    EXPECT_THROW(sink.write(record_of(3)), IoError);
    EXPECT_EQ(steps_of(path), (std::vector<int64_t>{1}));
  }
  sink.write(record_of(4));
  EXPECT_EQ(steps_of(path), (std::vector<int64_t>{1, 2, 3, 4}));
}

TEST_F(SinksTest, AFullDiskIsWarnedOfOnceAndTheRunGoesOn) {
  Config config;
  config.monitor.tensorboard = true;
  config.monitor.prometheus = (directory_ / "node.prom").string();
  const auto console = directory_ / "console";
  std::FILE* out = std::tmpfile();  // has its own limit trouble only beyond 4096 bytes
  {
    RunMonitor monitor(directory_, {.out = out, .total_steps = 100, .every = 1000}, config);
    monitor.step(record_of(1), 1);
    {
      const SizeLimit limit(std::filesystem::file_size(directory_ / "metrics.jsonl") + 1);
      for (int64_t step = 2; step < 5; ++step) EXPECT_NO_THROW(monitor.step(record_of(step), 1));
      EXPECT_NO_THROW(monitor.event(4, "checkpoint"));
    }
    monitor.step(record_of(5), 1);
  }
  std::fclose(out);
  EXPECT_EQ(steps_of(directory_ / "metrics.jsonl"), (std::vector<int64_t>{1, 2, 3, 4, 4, 5}));
}

TEST_F(SinksTest, TheNewestEventFileHasTheLargestName) {
  // One of a clock that was ahead, and one that is no event file of ours.
  for (const char* name : {"events.out.tfevents.7000000000.host.1.0", "events.out.tfevents.x"})
    write_file_atomically(directory_ / name, "");
  const auto newest = [this] {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(directory_))
      names.push_back(entry.path().filename().string());
    std::erase(names, "events.out.tfevents.x");
    return *std::ranges::max_element(names);
  };
  const TensorBoardSink first(directory_, {});
  EXPECT_TRUE(newest().starts_with("events.out.tfevents.7000000001.")) << newest();
  const TensorBoardSink second(directory_, {});
  EXPECT_TRUE(newest().starts_with("events.out.tfevents.7000000002.")) << newest();
}

TEST_F(SinksTest, PrometheusTextHasOneFamilyPerMetricWithLabels) {
  const auto path = directory_ / "node.prom";
  {
    PrometheusSink sink(path, "a \"run\"\\\n");
    EXPECT_EQ(read_file(path), "");
    Record record = record_of(7);
    record.add("moe/max_vio", 0.25);
    record.add("moe/max_vio/layer_3", 0.5);
    record.add("moe/max_vio/layer_61", std::numeric_limits<double>::infinity());
    record.add("mtp/loss/depth_1", std::numeric_limits<double>::quiet_NaN());
    sink.write(record);
    sink.write(record_of(8));  // the values of step 7 that step 8 lacks stay
  }
  const std::string run = R"(run="a \"run\"\\\n")";
  EXPECT_EQ(read_file(path),
            "# TYPE dsv3_moe_max_vio gauge\n"
            "dsv3_moe_max_vio{" +
                run +
                "} 0.25\n"
                "dsv3_moe_max_vio{" +
                run +
                ",layer=\"3\"} 0.5\n"
                "dsv3_moe_max_vio{" +
                run +
                ",layer=\"61\"} +Inf\n"
                "# TYPE dsv3_mtp_loss gauge\n"
                "dsv3_mtp_loss{" +
                run +
                ",depth=\"1\"} NaN\n"
                "# TYPE dsv3_step gauge\n"
                "dsv3_step{" +
                run +
                "} 8\n"
                "# TYPE dsv3_train_loss gauge\n"
                "dsv3_train_loss{" +
                run + "} 2.5\n");
  EXPECT_THROW(PrometheusSink(directory_ / "absent" / "x.prom", "run"), IoError);
}

}  // namespace
}  // namespace dsv3
