#include "checkpoint/save.h"

#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <functional>
#include <system_error>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/hf_config.h"
#include "checkpoint/tensor_files.h"
#include "checkpoint/weights.h"

namespace dsv3 {
namespace {

namespace fs = std::filesystem;
using detail::NamedTensor;

const at::Tensor* find_tensor(const std::vector<NamedTensor>& tensors, const std::string& name) {
  for (const NamedTensor& tensor : tensors) {
    if (tensor.name == name) return &tensor.view;
  }
  return nullptr;
}

/// Every piece of every parameter, and what the released layout holds besides.
std::vector<NamedTensor> named_weights(const ParameterSet& parameters, const ModelConfig& model,
                                       const StateTensors& state) {
  std::vector<NamedTensor> tensors;
  for (const auto& parameter : parameters.parameters()) {
    const at::Tensor value = value_in(state, parameters, parameter);
    for (const auto& piece : parameter.spec.pieces)
      tensors.push_back({piece.name, parameter.piece_view(piece, value)});
  }
  const at::Tensor* embedding = find_tensor(tensors, "model.embed_tokens.weight");
  const at::Tensor* head = find_tensor(tensors, "lm_head.weight");
  std::vector<NamedTensor> copies;
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
    for (const NamedTensor& tensor : tensors) {
      if (!tensor.name.ends_with(gate)) continue;
      const std::string base = tensor.name.substr(0, tensor.name.size() - gate.size());
      copies.push_back({base + ".mlp.gate.e_score_correction_bias",
                        at::zeros({tensor.view.size(0)}, at::TensorOptions(at::kFloat))});
    }
  }
  tensors.insert(tensors.end(), copies.begin(), copies.end());
  return tensors;
}

/// One companion's tensors, each piece under its global name (layer and expert ids), so that a
/// checkpoint re-shards as the weights do.
std::vector<NamedTensor> named_companion(const ParameterSet& parameters,
                                         const Companion& companion) {
  std::vector<NamedTensor> tensors;
  for (const auto& parameter : parameters.parameters()) {
    if (!parameter.spec.trainable) continue;
    const at::Tensor& flat = companion.flats[static_cast<size_t>(parameter.bucket)];
    if (!flat.defined()) continue;
    const at::Tensor part = part_of(parameter, flat);
    for (const auto& piece : parameter.spec.pieces)
      tensors.push_back({companion.prefix + "." + piece.name, parameter.piece_view(piece, part)});
  }
  return tensors;
}

/// Runs `write` on a fresh directory beside `target` and puts it in target's place; nothing is left
/// of it when that fails.
void write_directory(const fs::path& target, const std::function<void(const fs::path&)>& write) {
  // "DIR/" has an empty file name; the directory meant is DIR.
  const fs::path directory = target.has_filename() ? target : target.parent_path();
  const fs::path temporary =
      directory.parent_path() / ("." + directory.filename().string() + ".tmp");
  try {
    if (!directory.parent_path().empty()) fs::create_directories(directory.parent_path());
    fs::remove_all(temporary);  // of a save that was killed
    fs::create_directory(temporary);
    write(temporary);
    put_directory_in_place(temporary, directory);
  } catch (const fs::filesystem_error& error) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw IoError(fmt::format("cannot save {}: {}", directory.string(), error.what()));
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw;
  }
}

void write_model(const fs::path& directory, const ParameterSet& parameters,
                 const StateTensors& state, const ModelConfig& model, const SaveOptions& options,
                 Manifest& manifest) {
  detail::write_tensors(directory, "model", named_weights(parameters, model, state),
                        options.max_shard_bytes, manifest);
  detail::write_text(directory, "config.json", to_hf_config(model, options.eos_token_ids),
                     manifest);
  for (const ExtraFile& file : options.extra_files)
    detail::write_text(directory, file.name, file.content, manifest);
}

}  // namespace

void save_weights(const fs::path& directory, const ParameterSet& parameters,
                  const ModelConfig& model, const SaveOptions& options) {
  const c10::AutoGradMode no_gradients(false);
  write_directory(directory, [&](const fs::path& temporary) {
    Manifest manifest;
    write_model(temporary, parameters, state_of(parameters), model, options, manifest);
  });
}

uint64_t save_checkpoint(const fs::path& directory, const ParameterSet& parameters,
                         const StateTensors& state, const ModelConfig& model, int64_t step,
                         const SaveOptions& options) {
  const c10::AutoGradMode no_gradients(false);
  Manifest manifest{.step = step, .files = {}};
  write_directory(directory, [&](const fs::path& temporary) {
    write_model(temporary, parameters, state, model, options, manifest);
    for (const Companion& companion : state.companions)
      detail::write_tensors(temporary, companion.prefix, named_companion(parameters, companion),
                            options.max_shard_bytes, manifest);
    write_file_atomically(temporary / kManifestName, to_text(manifest));
  });
  return manifest.total_bytes();
}

}  // namespace dsv3
