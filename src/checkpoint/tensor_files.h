#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/manifest.h"
#include "checkpoint/safetensors.h"

// Tensors of LibTorch to and from safetensors files; for this room.
namespace dsv3::detail {

/// One tensor of a file and where its numbers are.
struct NamedTensor {
  std::string name;
  at::Tensor view;  // fp32, bf16 or fp64, on any device
};

/// Writes `tensors` into `directory` as STEM.safetensors, or, beyond `max_shard_bytes`, as
/// STEM-00001-of-0000N.safetensors with STEM.safetensors.index.json. What was written is added to
/// `manifest`. Throws IoError.
void write_tensors(const std::filesystem::path& directory, const std::string& stem,
                   const std::vector<NamedTensor>& tensors, uint64_t max_shard_bytes,
                   Manifest& manifest);

/// Writes one small file of a checkpoint and adds it to `manifest`.
void write_text(const std::filesystem::path& directory, const std::string& name,
                const std::string& content, Manifest& manifest);

/// The numbers of `stored` into `target`, converted where the types differ.
void fill(const StoredTensor& stored, const std::filesystem::path& file, const at::Tensor& target);

/// Everything wrong with the names and shapes of a set of files, by kind, for one message.
class NameCheck {
 public:
  explicit NameCheck(const WeightFiles& files) : files_(files) {}

  void expect(const std::string& name, const std::vector<int64_t>& shape);
  bool expected(const std::string& name) const { return expected_.contains(name); }
  const std::set<std::string>& expected() const { return expected_; }
  void unexpected(const std::string& name) { unexpected_.push_back(name); }
  void wrong(std::string text) { wrong_.push_back(std::move(text)); }
  /// Throws std::invalid_argument `PATH: SUMMARY` with the lists, when there is something in them.
  void raise(const std::filesystem::path& directory, const std::string& summary) const;

 private:
  const WeightFiles& files_;
  std::set<std::string> expected_;
  std::vector<std::string> missing_, unexpected_, wrong_;
};

}  // namespace dsv3::detail
