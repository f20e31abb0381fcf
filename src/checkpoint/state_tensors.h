#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "nn/companion.h"
#include "nn/parameter.h"

namespace dsv3 {

/// All numbers that a checkpoint holds, as few large tensors: the live ones of a run, or a copy of
/// them on the host.
struct StateTensors {
  std::vector<at::Tensor> values;   // one for each bucket, [numel]
  std::vector<at::Tensor> buffers;  // one for each parameter that is not trainable, in order of
                                    // declaration (routing biases)
  std::vector<Companion> companions;

  /// Every tensor that is there, in a fixed order.
  std::vector<at::Tensor> all() const;
  uint64_t num_bytes() const;
};

/// The live tensors of `parameters` and what goes with them. Nothing is copied.
StateTensors state_of(const ParameterSet& parameters, std::vector<Companion> companions = {});

/// The parameter's tensor inside `state`.
at::Tensor value_in(const StateTensors& state, const ParameterSet& parameters,
                    const Parameter& parameter);

/// Fills `target`'s tensors from PREFIX.safetensors (or its shards) of a checkpoint: one tensor
/// `PREFIX.NAME` for each piece of each trainable parameter whose bucket has one. Types are
/// converted where they differ. Before anything is changed all names and shapes are checked; what
/// is missing, unexpected or of another shape is named in one std::invalid_argument. With
/// `part_only`, tensors of parameters that are not declared here (MTP modules) are passed over.
void load_companion(const std::filesystem::path& checkpoint, const ParameterSet& parameters,
                    const Companion& target, bool part_only = false);

/// Whether the checkpoint holds a companion of that prefix.
bool has_companion(const std::filesystem::path& checkpoint, const std::string& prefix);

}  // namespace dsv3
