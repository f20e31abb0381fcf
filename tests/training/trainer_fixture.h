#pragma once

#include <gtest/gtest.h>

#include <cstdio>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "base/file.h"
#include "training/tiny.h"
#include "training/trainer.h"

namespace dsv3::test {

/// Trains tiny configs in a directory of its own.
class TrainerFixture : public testing::Test {
 protected:
  TrainerFixture() : config_(tiny_config(directory_.path(), tiny_text(60))) {
    console_ = std::fopen((directory_.path() / "console").c_str(), "w");
  }
  ~TrainerFixture() override { std::fclose(console_); }

  std::unique_ptr<Trainer> make(const std::string& name, const Config& config) {
    return std::make_unique<Trainer>(config, TrainerOptions{.directory = directory_.path() / name,
                                                            .console = console_,
                                                            .stop_requested = stop_});
  }

  std::vector<nlohmann::json> metrics(const std::string& name) {
    std::istringstream lines(read_file(directory_.path() / name / "metrics.jsonl"));
    std::vector<nlohmann::json> records;
    for (std::string line; std::getline(lines, line);)
      records.push_back(nlohmann::json::parse(line));
    return records;
  }
  /// The events called `event`.
  std::vector<nlohmann::json> events(const std::string& name, const std::string& event) {
    std::vector<nlohmann::json> found;
    for (const auto& record : metrics(name))
      if (record.contains("event") && record["event"] == event) found.push_back(record);
    return found;
  }

  const TemporaryDirectory directory_;
  Config config_;
  std::FILE* console_ = nullptr;
  std::function<bool()> stop_;  // asked before each step
};

}  // namespace dsv3::test
