#pragma once

#include <cstdint>
#include <filesystem>

#include "checkpoint/state_tensors.h"
#include "checkpoint/weights.h"
#include "config/config.h"
#include "nn/parameter.h"

namespace dsv3 {

/// Writes a whole checkpoint of step `step` into `directory` (docs/reliability.md has the layout):
/// the weights as save_weights() does, each companion of `state` as PREFIX.safetensors with one
/// tensor `PREFIX.NAME` for each weight NAME, options.extra_files, and manifest.json last.
/// Everything is written to `.NAME.tmp` beside it, synced and renamed in one step: `directory`
/// holds what it held before, or the new checkpoint whole. `parameters` gives names and places
/// only; the numbers are those of `state`. Returns the bytes written. Throws IoError.
uint64_t save_checkpoint(const std::filesystem::path& directory, const ParameterSet& parameters,
                         const StateTensors& state, const ModelConfig& model, int64_t step,
                         const SaveOptions& options = {});

}  // namespace dsv3
