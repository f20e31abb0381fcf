#pragma once

#include <chrono>
#include <filesystem>
#include <map>
#include <string>

#include "monitor/sink.h"

namespace dsv3 {

/// The newest value of every metric in Prometheus' text exposition format, for the textfile
/// collector of a node exporter. "moe/max_vio/layer_3" becomes dsv3_moe_max_vio{run="…",layer="3"};
/// tables are left out. Written beside the path and renamed, at most every few seconds and at the
/// end: the collector never sees half a file.
class PrometheusSink : public Sink {
 public:
  /// `run` becomes a label. Throws IoError when the first, empty file cannot be written.
  PrometheusSink(std::filesystem::path path, std::string run);
  ~PrometheusSink() override;
  void write(const Record& record) override;

  /// The whole file's text.
  std::string text() const;

 private:
  std::filesystem::path path_;
  std::string run_;
  std::map<std::string, std::map<std::string, double>> families_;  // by name, then by labels
  std::chrono::steady_clock::time_point written_;
};

}  // namespace dsv3
