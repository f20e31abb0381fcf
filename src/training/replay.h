#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "training/trainer.h"

namespace dsv3 {

/// Norm of one tensor of a replayed step.
struct TensorNorm {
  int64_t micro_batch = -1;  // of an activation
  int64_t layer = -1;        // as ParameterSpec::layer
  std::string name;          // "attention", "moe", …, or the parameter's name
  double norm = 0;           // Euclidean, over its finite and other numbers alike
  double largest = 0;        // max |x|
  int64_t bad = 0;           // numbers that are NaN or infinite
};

/// One optimizer step looked at from inside: forward and backward of its global batch with the
/// weights before it.
struct Replay {
  int64_t step = 0;
  int64_t from = 0;  // the checkpoint's step; 0 = from the start
  double loss = 0, grad_norm = 0;
  std::vector<std::string> samples = {};     // of its batch (Loader::describe())
  std::vector<TensorNorm> weights = {};      // in the order of declaration
  std::vector<TensorNorm> activations = {};  // as the forward pass made them
  std::vector<TensorNorm> gradients = {};    // of the parameters, in the order of declaration

  /// The first bad tensor, in words: a weight, else an activation, else the gradient that the
  /// backward pass reached first; empty when every number is finite.
  std::string first_bad() const;
};

/// A table, layer by layer, ended by the verdict.
std::string to_text(const Replay& replay);

/// Looks into the next step of `trainer`: runs forward and backward, changes no weight; gradients
/// are zero afterwards.
Replay replay_next(Trainer& trainer);

/// Runs step `step` of the run in `directory` again: from its newest whole checkpoint below `step`
/// (from the start where there is none), forward to it, and then as replay_next() does. Writes
/// nothing into the run. `device`: instead of the run's, may be empty. Throws std::invalid_argument
/// when `directory` is no run.
Replay replay(const std::filesystem::path& directory, int64_t step, const std::string& device);

}  // namespace dsv3
