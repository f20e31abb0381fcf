#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"
#include "config/config.h"
#include "nn/parameter.h"

namespace dsv3 {

/// Fills every allocated parameter of `parameters` from the checkpoint in `directory` by the names
/// of its pieces. F32, BF16, F16 and F64 tensors are converted to the parameter's dtype. Before
/// anything is changed, all names and shapes are checked; missing, unexpected and wrong-shaped
/// tensors are named together in one std::invalid_argument. Not unexpected: rotary tables of old
/// checkpoints, tensors without elements, the copies of embedding and head in MTP layers (they must
/// equal the shared ones), a head that is tied, a router bias of zeros, and whole layers from
/// `num_layers` on when the model declares no MTP module. num_layers: of the model, without MTP.
void load_weights(const std::filesystem::path& directory, ParameterSet& parameters,
                  int64_t num_layers);

/// Files beside the weights: name and content ("dsv3.yaml").
struct ExtraFile {
  std::string name;
  std::string content;
};

struct SaveOptions {
  uint64_t max_shard_bytes = 5'000'000'000;  // larger models: several files and an index
  std::vector<int64_t> eos_token_ids = {};   // into config.json
  std::vector<ExtraFile> extra_files = {};
};

/// Saves the parameters as safetensors under the released names (parameters in the dtype they are
/// held in, the router's bias always, MTP layers with their copies of embedding and head) with
/// config.json, into `directory`. Everything is written beside it, synced and renamed there in one
/// step: `directory` holds the old checkpoint whole or the new one. Throws IoError.
void save_weights(const std::filesystem::path& directory, const ParameterSet& parameters,
                  const ModelConfig& model, const SaveOptions& options = {});

}  // namespace dsv3
