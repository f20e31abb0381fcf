#include "inference/run.h"

#include <c10/util/Exception.h>

#include "base/error.h"
#include "checkpoint/catalogue.h"
#include "checkpoint/hf_config.h"
#include "checkpoint/state_tensors.h"
#include "checkpoint/weights.h"
#include "config/load.h"

namespace dsv3 {
namespace {

namespace fs = std::filesystem;

fs::path checkpoint_of(const fs::path& directory) {
  if (!fs::is_directory(directory)) {
    throw IoError(fmt::format("{} is not a directory", directory.string()));
  }
  if (fs::exists(directory / "config.json") || fs::exists(directory / kManifestName))
    return directory;
  require(fs::is_directory(directory / "checkpoints"),
          "{} is neither a run (no checkpoints/) nor a checkpoint (no config.json)",
          directory.string());
  return latest_checkpoint(directory);
}

}  // namespace

OpenedModel open_model(const fs::path& directory, const OpenOptions& options) {
  OpenedModel opened;
  opened.device = options.device;
  opened.checkpoint = checkpoint_of(directory);
  require_undamaged(opened.checkpoint);
  const HfConfig described = load_hf_config(opened.checkpoint);
  ModelConfig config = described.model;
  if (const auto yaml = opened.checkpoint / "dsv3.yaml"; fs::exists(yaml)) {
    opened.run = load_config(yaml, {});
    config = opened.run->model;
    config.vocab_size = described.model.vocab_size;  // 0 in the YAML stands for the tokenizer's
  }
  if (options.dtype) config.dtype = *options.dtype;
  config.mtp.num_nextn_predict_layers = 0;
  for (const int64_t id : described.eos_token_ids) {
    // Some files name ids beyond the vocabulary; no token can be one of those.
    if (id >= 0 && id < config.vocab_size) opened.stop_tokens.push_back(static_cast<int32_t>(id));
  }
  if (options.device.is_cuda()) require_cuda_widths(config);
  opened.parameters = std::make_unique<ParameterSet>();
  opened.model = std::make_unique<Model>(config, *opened.parameters);
  try {
    opened.parameters->allocate(
        {.dtype = config.dtype, .gradients = false, .cuda = options.device.is_cuda()});
  } catch (const c10::Error&) {
    throw IoError(
        fmt::format("{}: a model of {} parameters in {} does not fit into this device's "
                    "memory",
                    (opened.checkpoint / "config.json").string(),
                    opened.parameters->total_parameters(), name_of(config.dtype)));
  }
  load_weights(opened.checkpoint, *opened.parameters, config.num_layers);
  if (!options.averaged) return opened;
  require(has_companion(opened.checkpoint, "ema"),
          "{} holds no moving average of the weights; training.ema.decay makes one",
          opened.checkpoint.string());
  Companion average{.prefix = "ema", .flats = {}};
  for (const auto& bucket : opened.parameters->buckets())
    average.flats.push_back(bucket.values.detach());
  load_companion(opened.checkpoint, *opened.parameters, average, /*part_only=*/true);
  return opened;
}

}  // namespace dsv3
