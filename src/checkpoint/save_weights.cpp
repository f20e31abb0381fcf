#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <fcntl.h>
#include <stdio.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/hf_config.h"
#include "checkpoint/weights.h"

namespace dsv3 {
namespace {

namespace fs = std::filesystem;

/// One tensor of the checkpoint and where its numbers are.
struct Entry {
  std::string name;
  at::Tensor view;
};

StoredType stored_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return StoredType::kF32;
    case at::kBFloat16:
      return StoredType::kBF16;
    case at::kDouble:
      return StoredType::kF64;
    default:
      invalid("weights are saved in fp32, bf16 or fp64, not {}",
              c10::toString(tensor.scalar_type()));
  }
}

const at::Tensor* find_entry(const std::vector<Entry>& entries, const std::string& name) {
  for (const Entry& entry : entries) {
    if (entry.name == name) return &entry.view;
  }
  return nullptr;
}

/// Every piece of every parameter, and what the released layout holds besides.
std::vector<Entry> collect(const ParameterSet& parameters, const ModelConfig& model) {
  std::vector<Entry> entries;
  for (const auto& parameter : parameters.parameters()) {
    for (const auto& piece : parameter.spec.pieces) {
      entries.push_back({piece.name, parameter.piece_view(piece, parameter.value().detach())});
    }
  }
  const at::Tensor* embedding = find_entry(entries, "model.embed_tokens.weight");
  const at::Tensor* head = find_entry(entries, "lm_head.weight");
  std::vector<Entry> copies;
  for (int64_t depth = 0; embedding != nullptr && depth < model.mtp.num_nextn_predict_layers;
       ++depth) {
    const std::string prefix = fmt::format("model.layers.{}.", model.num_layers + depth);
    copies.push_back({prefix + "embed_tokens.weight", *embedding});
    copies.push_back({prefix + "shared_head.head.weight", head != nullptr ? *head : *embedding});
  }
  // A sigmoid router has a bias in every released file: zeros where this model has none.
  const bool sigmoid = model.moe.scoring == MoeConfig::Scoring::kSigmoid;
  if (sigmoid && !model.moe.use_bias) {
    const std::string gate = ".mlp.gate.weight";
    for (const Entry& entry : entries) {
      if (!entry.name.ends_with(gate)) continue;
      const std::string base = entry.name.substr(0, entry.name.size() - gate.size());
      copies.push_back({base + ".mlp.gate.e_score_correction_bias",
                        at::zeros({entry.view.size(0)}, at::TensorOptions(at::kFloat))});
    }
  }
  entries.insert(entries.end(), copies.begin(), copies.end());
  return entries;
}

void write_shard(const fs::path& path, const std::vector<Entry>& entries) {
  std::vector<TensorPlan> plan;
  std::map<std::string, const at::Tensor*> by_name;
  for (const Entry& entry : entries) {
    plan.push_back({entry.name, stored_type(entry.view), entry.view.sizes().vec()});
    by_name[entry.name] = &entry.view;
  }
  SafetensorsWriter writer(path, std::move(plan));
  for (const TensorPlan& tensor : writer.order()) {
    const at::Tensor host = by_name.at(tensor.name)->cpu().contiguous();
    writer.write(
        {static_cast<const std::byte*>(host.const_data_ptr()), static_cast<size_t>(host.nbytes())});
  }
  writer.commit();
}

std::vector<std::vector<Entry>> split(const std::vector<Entry>& entries, uint64_t max_bytes) {
  std::vector<std::vector<Entry>> shards(1);
  uint64_t bytes = 0;
  for (const Entry& entry : entries) {
    if (bytes > 0 && bytes + entry.view.nbytes() > max_bytes) {
      shards.emplace_back();
      bytes = 0;
    }
    bytes += entry.view.nbytes();
    shards.back().push_back(entry);
  }
  return shards;
}

void write_weights(const fs::path& directory, const std::vector<Entry>& entries,
                   uint64_t max_shard_bytes) {
  const auto shards = split(entries, max_shard_bytes);
  if (shards.size() == 1) return write_shard(directory / "model.safetensors", shards[0]);
  nlohmann::ordered_json index;
  uint64_t total = 0;
  std::map<std::string, std::string> weight_map;
  for (size_t i = 0; i < shards.size(); ++i) {
    const auto name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    for (const Entry& entry : shards[i]) {
      weight_map[entry.name] = name;
      total += entry.view.nbytes();
    }
    write_shard(directory / name, shards[i]);
  }
  index["metadata"]["total_size"] = total;
  index["weight_map"] = weight_map;
  write_file_atomically(directory / "model.safetensors.index.json", index.dump(2) + "\n");
}

/// Puts the finished `temporary` in the place of `directory`, which may hold an older checkpoint.
void put_in_place(const fs::path& temporary, const fs::path& directory) {
  sync_directory(temporary);
  if (::rename(temporary.c_str(), directory.c_str()) != 0) {
    // The place is taken: both names change their content in one step, then the old one goes.
    if (::renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, directory.c_str(), RENAME_EXCHANGE) !=
        0) {
      throw IoError(fmt::format("cannot put {} in the place of {}: {}", temporary.string(),
                                directory.string(), std::strerror(errno)));
    }
    sync_directory(directory.parent_path());
    fs::remove_all(temporary);
  }
  sync_directory(directory.parent_path());
}

}  // namespace

void save_weights(const fs::path& target, const ParameterSet& parameters, const ModelConfig& model,
                  const SaveOptions& options) {
  const c10::AutoGradMode no_gradients(false);
  // "DIR/" has an empty file name; the directory meant is DIR.
  const fs::path directory = target.has_filename() ? target : target.parent_path();
  const fs::path temporary =
      directory.parent_path() / ("." + directory.filename().string() + ".tmp");
  try {
    if (!directory.parent_path().empty()) fs::create_directories(directory.parent_path());
    fs::remove_all(temporary);  // of a save that was killed
    fs::create_directory(temporary);
    write_weights(temporary, collect(parameters, model), options.max_shard_bytes);
    write_file_atomically(temporary / "config.json", to_hf_config(model, options.eos_token_ids));
    for (const ExtraFile& file : options.extra_files) {
      write_file_atomically(temporary / file.name, file.content);
    }
    put_in_place(temporary, directory);
  } catch (const fs::filesystem_error& error) {
    throw IoError(fmt::format("cannot save {}: {}", directory.string(), error.what()));
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw;
  }
}

fs::path checkpoint_directory(const fs::path& run, int64_t step) {
  return run / "checkpoints" / fmt::format("step_{}", step);
}

fs::path latest_checkpoint(const fs::path& run) {
  std::optional<int64_t> newest;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(run / "checkpoints", error)) {
    const std::string name = entry.path().filename().string();
    constexpr std::string_view kPrefix = "step_";
    if (!name.starts_with(kPrefix) || !fs::exists(entry.path() / "config.json")) continue;
    int64_t step = 0;
    const char* end = name.data() + name.size();
    const auto parsed = std::from_chars(name.data() + kPrefix.size(), end, step);
    if (parsed.ec == std::errc() && parsed.ptr == end && step > newest.value_or(-1)) newest = step;
  }
  require(newest.has_value(), "{} holds no checkpoint (expected {})", run.string(),
          (run / "checkpoints" / "step_N").string());
  return checkpoint_directory(run, *newest);
}

}  // namespace dsv3
