#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "config/config.h"
#include "data/batch.h"
#include "support/random.h"

namespace dsv3::test {

/// A directory of its own, removed at the end.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// Two layers (one dense, one MoE with a shared expert) and one MTP module, FP32, of a few thousand
/// parameters.
ModelConfig tiny_model();

/// A whole config that trains tiny_model() on `text`, which is written into `directory`; every
/// third line is held out.
Config tiny_config(const std::filesystem::path& directory, const std::string& text);

/// A few lines of words that repeat enough to be learnt.
std::string tiny_text(int lines);

/// Random tokens; about a third of the labels (all of them when `none_valid`) do not count.
Batch random_batch(Random& random, const ModelConfig& model, int64_t sequences, int64_t length,
                   bool none_valid = false);

/// Rows [first, first + count) of a batch.
Batch rows_of(const Batch& batch, int64_t first, int64_t count);

}  // namespace dsv3::test
