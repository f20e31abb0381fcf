#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "data/loader.h"

namespace dsv3 {

/// What a run needs beside its tensors to go on: state.json of a checkpoint. Nothing else is
/// needed: learning rate, batch size, γ and λ are functions of steps and tokens; every random
/// number (weights, shuffling, fill-in-the-middle) of the seed and of what it is for, so that no
/// generator has a state; expert loads are counted within one step.
struct TrainingState {
  int64_t step = 0;               // optimizer steps done
  int64_t tokens = 0;             // input tokens of them
  int64_t optimizer_steps = 0;    // AdamW's own count, for the correction of its moments' bias
  int64_t ema_updates = 0;        // of the weights' moving average
  int64_t evaluated_step = -1;    // step of the last evaluation that was completed; -1 = none
  bool finished = false;          // training.steps were done and evaluated
  int64_t seed = 0;               // training.seed
  LoaderState data;               // where the training data stands
  std::string watch;              // JSON of StepWatch: skipped steps, the window of losses
  double saved_at = 0;            // seconds since 1970
  std::string working_directory;  // where the program ran: relative paths of the config start there
};

/// JSON, indented.
std::string to_json(const TrainingState& state);

/// Reads CHECKPOINT/state.json. Throws IoError that names the file.
TrainingState load_training_state(const std::filesystem::path& checkpoint);

}  // namespace dsv3
