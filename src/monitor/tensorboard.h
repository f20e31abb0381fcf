#pragma once

#include <chrono>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "config/load.h"
#include "monitor/event_file.h"
#include "monitor/sink.h"

namespace dsv3 {

/// Writes one TensorBoard event file into a directory: every value as a scalar, every row of a
/// CountTable as a histogram NAME/layer_L with the expert's id on the x axis (expert e is the
/// bucket (e - 0.5, e + 0.5]) and their sum over layers as NAME, the config as hyperparameters.
///
/// The file begins with a session start at the first record's step: where a run goes on from an
/// earlier step, TensorBoard then drops what earlier files have from there on. Flushed every few
/// seconds. Not finite values are written as they are; TensorBoard shows them as such.
class TensorBoardSink : public Sink {
 public:
  /// Creates the directory and the file events.out.tfevents.SECONDS.HOST.PID.N. Throws IoError.
  TensorBoardSink(const std::filesystem::path& directory, FlatConfig hyperparameters);
  void write(const Record& record) override;

 private:
  void start(int64_t step);

  RecordFile file_;
  FlatConfig hyperparameters_;
  bool started_ = false;
  std::chrono::steady_clock::time_point flushed_;
};

}  // namespace dsv3
